//! The syntax tree of a template.

use std::rc::Rc;

pub(super) type Body = Rc<Vec<Statement>>;

#[derive(Debug)]
pub(super) enum Statement {
    Text(String),
    Print(Expr),
    If {
        branches: Vec<(Expr, Body)>,
        otherwise: Body,
    },
    For(Rc<For>),
    Set(Target, Expr),
    SetBlock {
        target: Target,
        filter: Vec<Filter>,
        body: Body,
    },
    Macro(Rc<Macro>),
    Call {
        call: Expr,
        body: Rc<Macro>,
    },
    FilterBlock {
        filter: Vec<Filter>,
        body: Body,
    },
    With {
        values: Vec<(Target, Expr)>,
        body: Body,
    },
    /// A `generation` block, which Jinja runs as a macro without a name.
    Generation(Rc<Macro>),
    Break,
    Continue,
}

#[derive(Debug)]
pub(super) struct For {
    pub target: Target,
    pub over: Expr,
    pub only: Option<Expr>,
    pub recursive: bool,
    pub body: Body,
    pub otherwise: Body,
}

#[derive(Debug)]
pub(super) struct Macro {
    /// Empty for the body of a `call` or `generation`.
    pub name: String,
    pub parameters: Vec<(String, Option<Expr>)>,
    pub body: Body,
    pub uses_caller: bool,
    pub uses_varargs: bool,
    pub uses_kwargs: bool,
}

/// The target of an assignment.
#[derive(Debug)]
pub(super) enum Target {
    Name(String),
    Tuple(Vec<Target>),
    /// `ns.attribute`
    Attribute(String, String),
}

#[derive(Debug)]
pub(super) enum Literal {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Rc<str>),
}

#[derive(Debug)]
pub(super) enum Expr {
    Literal(Literal),
    Name(String),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Attribute(Box<Expr>, String),
    Item(Box<Expr>, Box<Expr>),
    Slice(Box<Expr>, [Option<Box<Expr>>; 3]),
    Call(Box<Expr>, Arguments),
    Filter(Box<Expr>, Filter),
    Test(Box<Expr>, String, Arguments),
    Unary(&'static str, Box<Expr>),
    Binary(&'static str, Box<Expr>, Box<Expr>),
    And(Box<Expr>, Box<Expr>),
    Or(Box<Expr>, Box<Expr>),
    Not(Box<Expr>),
    Compare(Box<Expr>, Vec<(&'static str, Expr)>),
    Concat(Vec<Expr>),
    /// The condition, then, else.
    If(Box<Expr>, Box<Expr>, Option<Box<Expr>>),
}

#[derive(Debug)]
pub(super) struct Filter {
    pub name: String,
    pub arguments: Arguments,
}

/// Arguments of a call, in source order.
#[derive(Debug, Default)]
pub(super) struct Arguments {
    pub positional: Vec<Expr>,
    pub named: Vec<(String, Expr)>,
    /// `*list`
    pub list: Option<Box<Expr>>,
    /// `**dict`
    pub dict: Option<Box<Expr>>,
}
