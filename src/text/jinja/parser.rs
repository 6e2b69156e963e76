//! Statements to a syntax tree, by Jinja's grammar; `expressions` parses the expressions in them.
//!
//! Statements that need other templates, and those of extensions that transformers does not load, are refused.

use std::rc::Rc;

use super::Error;
use super::ast::{Body, Expr, For, Macro, Statement, Target};
use super::lexer::{Lexed, Token, lex};
use super::names;

/// Maximum nesting of expressions and statements; more would exhaust the stack.
const DEEPEST: usize = 64;
/// Maximum number of operators, calls and filters in one tag, for the same reason: each may be an operand of the next.
const MOST_OPERATORS: usize = 400;

pub(super) fn parse(source: &str) -> Result<Body, Error> {
    let mut parser = Parser {
        tokens: lex(source)?,
        at: 0,
        names: Vec::new(),
        depth: 0,
        branches: 0,
        loops: 0,
        fors: 0,
        operators: 0,
    };
    let body = parser.body(&[])?;
    Ok(body)
}

pub(super) struct Parser {
    pub(super) tokens: Vec<Lexed>,
    pub(super) at: usize,
    /// Every name that is read, in order.
    pub(super) names: Vec<String>,
    pub(super) depth: usize,
    /// Enclosing `if`s, where unknown filters are an error only when reached.
    pub(super) branches: usize,
    /// Enclosing `for`s within the same macro.
    loops: usize,
    /// Enclosing `for`s, including those outside of macros.
    fors: usize,
    /// Operators of this tag so far.
    operators: usize,
}

pub(super) type Parsed<T> = Result<T, Error>;

impl Parser {
    pub(super) fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(token, _)| token)
    }

    pub(super) fn next(&mut self) -> Option<Token> {
        let token = self.peek().cloned();
        self.at += 1;
        token
    }

    pub(super) fn fail<T>(&self, message: impl Into<String>) -> Parsed<T> {
        let last = self.tokens.last();
        let line = self.tokens.get(self.at).or(last).map_or(1, |(_, line)| *line);
        Err(Error::syntax(line, message))
    }

    pub(super) fn unexpected<T>(&self, wanted: &str) -> Parsed<T> {
        let found = match self.peek() {
            None => "the end of the template".to_string(),
            Some(Token::Name(name)) => format!("{name:?}"),
            Some(Token::Op(op)) => format!("{op:?}"),
            Some(Token::BlockEnd) => "the end of the statement".to_string(),
            Some(Token::VariableEnd) => "the end of the expression".to_string(),
            Some(token) => format!("{token:?}"),
        };
        self.fail(format!("unexpected {found}, expected {wanted}"))
    }

    pub(super) fn is_op(&self, op: &str) -> bool {
        matches!(self.peek(), Some(Token::Op(found)) if *found == op)
    }

    pub(super) fn skip_op(&mut self, op: &str) -> bool {
        let is = self.is_op(op);
        self.at += usize::from(is);
        is
    }

    pub(super) fn expect_op(&mut self, op: &str) -> Parsed<()> {
        match self.skip_op(op) {
            true => Ok(()),
            false => self.unexpected(&format!("{op:?}")),
        }
    }

    pub(super) fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Some(Token::Name(found)) if found == name)
    }

    pub(super) fn skip_name(&mut self, name: &str) -> bool {
        let is = self.is_name(name);
        self.at += usize::from(is);
        is
    }

    pub(super) fn name(&mut self) -> Parsed<String> {
        match self.peek() {
            Some(Token::Name(name)) => {
                let name = name.clone();
                self.at += 1;
                Ok(name)
            }
            _ => self.unexpected("a name"),
        }
    }

    pub(super) fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        if self.depth >= DEEPEST {
            return Err(Error::unsupported(format!(
                "a template nested more than {DEEPEST} levels deep"
            )));
        }
        self.depth += 1;
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    pub(super) fn operator(&mut self) -> Parsed<()> {
        self.operators += 1;
        match self.operators > MOST_OPERATORS {
            true => Err(Error::unsupported(format!(
                "an expression of more than {MOST_OPERATORS} operators"
            ))),
            false => Ok(()),
        }
    }

    /// Statements up to one of these names, leaving the position after its `{%`; without names, up to the end.
    fn body(&mut self, ends: &[&str]) -> Parsed<Body> {
        let mut body = Vec::new();
        while let Some(token) = self.next() {
            self.operators = 0;
            match token {
                Token::Data(text) => body.push(Statement::Text(text)),
                Token::VariableBegin => {
                    body.push(Statement::Print(self.tuple(&[], false, true)?));
                    match self.peek() {
                        Some(Token::VariableEnd) => self.at += 1,
                        _ => return self.unexpected("the end of the expression"),
                    }
                }
                Token::BlockBegin => {
                    if ends.iter().any(|end| self.is_name(end)) {
                        return Ok(Rc::new(body));
                    }
                    body.extend(self.deeper(Self::statement)?);
                    self.block_end()?;
                }
                _ => {
                    self.at -= 1;
                    return self.unexpected("text or a tag");
                }
            }
        }
        match ends {
            [] => Ok(Rc::new(body)),
            ends => self.fail(format!("the template ends before {:?}", ends.join(" or "))),
        }
    }

    fn block_end(&mut self) -> Parsed<()> {
        match self.peek() {
            Some(Token::BlockEnd) => {
                self.at += 1;
                Ok(())
            }
            _ => self.unexpected("the end of the statement"),
        }
    }

    /// The end of a tag, and statements.
    fn statements(&mut self, ends: &[&str]) -> Parsed<Body> {
        self.skip_op(":");
        self.block_end()?;
        self.body(ends)
    }

    fn statement(&mut self) -> Parsed<Vec<Statement>> {
        let name = match self.peek() {
            Some(Token::Name(name)) => name.clone(),
            _ => return self.unexpected("a statement"),
        };
        self.at += 1;
        let one = match name.as_str() {
            "for" => self.for_loop()?,
            "if" => self.if_chain()?,
            "set" => self.set()?,
            "macro" => {
                let name = self.name()?;
                let parameters = self.signature()?;
                Statement::Macro(self.macro_body(name, parameters, "endmacro")?)
            }
            "call" => {
                let parameters = match self.is_op("(") {
                    true => self.signature()?,
                    false => Vec::new(),
                };
                let call = self.expression()?;
                if !matches!(call, Expr::Call(..)) {
                    return self.fail("expected a call");
                }
                let body = self.macro_body(String::new(), parameters, "endcall")?;
                Statement::Call { call, body }
            }
            "filter" => {
                let mut filter = vec![self.filter()?];
                while self.skip_op("|") {
                    filter.push(self.filter()?);
                }
                let body = self.statements(&["endfilter"])?;
                self.at += 1;
                Statement::FilterBlock { filter, body }
            }
            "with" => {
                let mut values = Vec::new();
                while !matches!(self.peek(), Some(Token::BlockEnd)) {
                    if !values.is_empty() {
                        self.expect_op(",")?;
                    }
                    let target = self.target(&[])?;
                    self.expect_op("=")?;
                    values.push((target, self.expression()?));
                }
                let body = self.statements(&["endwith"])?;
                self.at += 1;
                Statement::With { values, body }
            }
            // transformers' mark for training masks, which renders its body; in Jinja it is a call with a body.
            "generation" => Statement::Generation(self.macro_body(String::new(), Vec::new(), "endgeneration")?),
            "print" => {
                let mut all = Vec::new();
                while !matches!(self.peek(), Some(Token::BlockEnd)) {
                    if !all.is_empty() {
                        self.expect_op(",")?;
                    }
                    all.push(Statement::Print(self.expression()?));
                }
                return Ok(all);
            }
            "break" | "continue" if self.loops == 0 => return self.fail(format!("{name:?} outside of a loop")),
            "break" => Statement::Break,
            "continue" => Statement::Continue,
            name if names::STATEMENTS_REFUSED.contains(&name) => {
                return Err(Error::unsupported(format!("the statement {name:?}")));
            }
            name => {
                self.at -= 1;
                return self.fail(format!("unknown statement {name:?}"));
            }
        };
        Ok(vec![one])
    }

    fn for_loop(&mut self) -> Parsed<Statement> {
        self.fors += 1;
        let target = self.target(&["in"])?;
        if !self.skip_name("in") {
            return self.unexpected("\"in\"");
        }
        let over = self.tuple(&["recursive"], false, false)?;
        let only = match self.skip_name("if") {
            true => Some(self.expression()?),
            false => None,
        };
        let recursive = self.skip_name("recursive");
        let around = self.loops;
        self.loops += 1;
        let body = self.statements(&["endfor", "else"])?;
        self.loops = around;
        let otherwise = match self.name()?.as_str() {
            "else" => {
                let otherwise = self.statements(&["endfor"])?;
                self.at += 1;
                otherwise
            }
            _ => Body::default(),
        };
        self.fors -= 1;
        Ok(Statement::For(Rc::new(For {
            target,
            over,
            only,
            recursive,
            body,
            otherwise,
        })))
    }

    fn if_chain(&mut self) -> Parsed<Statement> {
        let mut branches = Vec::new();
        let mut otherwise = Body::default();
        self.branches += 1;
        loop {
            let condition = self.tuple(&[], false, false)?;
            branches.push((condition, self.statements(&["elif", "else", "endif"])?));
            match self.name()?.as_str() {
                "elif" => {}
                "else" => {
                    otherwise = self.statements(&["endif"])?;
                    self.at += 1;
                    break;
                }
                _ => break,
            }
        }
        self.branches -= 1;
        Ok(Statement::If { branches, otherwise })
    }

    fn set(&mut self) -> Parsed<Statement> {
        let target = self.target(&[])?;
        if self.skip_op("=") {
            return Ok(Statement::Set(target, self.tuple(&[], false, true)?));
        }
        let mut filter = Vec::new();
        while self.skip_op("|") {
            filter.push(self.filter()?);
        }
        let body = self.statements(&["endset"])?;
        self.at += 1;
        Ok(Statement::SetBlock { target, filter, body })
    }

    fn signature(&mut self) -> Parsed<Vec<(String, Option<Expr>)>> {
        self.expect_op("(")?;
        let mut parameters: Vec<(String, Option<Expr>)> = Vec::new();
        while !self.is_op(")") {
            if !parameters.is_empty() {
                self.expect_op(",")?;
            }
            let name = self.plain_name()?;
            if ["caller", "varargs", "kwargs"].contains(&name.as_str()) {
                return Err(Error::unsupported(format!("a parameter called {name:?}")));
            }
            let default = match self.skip_op("=") {
                true => Some(self.expression()?),
                false if parameters.iter().any(|(_, default)| default.is_some()) => {
                    return self.fail("a parameter without a default follows one with a default");
                }
                false => None,
            };
            parameters.push((name, default));
        }
        self.expect_op(")")?;
        Ok(parameters)
    }

    fn macro_body(&mut self, name: String, parameters: Vec<(String, Option<Expr>)>, end: &str) -> Parsed<Rc<Macro>> {
        let seen = self.names.len();
        let loops = std::mem::take(&mut self.loops);
        let body = self.statements(&[end])?;
        self.loops = loops;
        self.at += 1;
        let uses = |name: &str| self.names[seen..].iter().any(|n| n == name);
        Ok(Rc::new(Macro {
            uses_caller: uses("caller"),
            uses_varargs: uses("varargs"),
            uses_kwargs: uses("kwargs"),
            name,
            parameters,
            body,
        }))
    }

    /// A name that can be assigned to.
    fn plain_name(&mut self) -> Parsed<String> {
        let name = self.name()?;
        match name.as_str() {
            "true" | "false" | "none" | "True" | "False" | "None" => self.fail(format!("cannot assign to {name:?}")),
            _ => Ok(name),
        }
    }

    fn target(&mut self, ends: &[&str]) -> Parsed<Target> {
        let mut targets = Vec::new();
        let mut is_tuple = false;
        loop {
            if is_tuple && (self.is_op("=") || self.is_op(")") || ends.iter().any(|end| self.is_name(end))) {
                break;
            }
            targets.push(match self.skip_op("(") {
                true => {
                    let inner = self.deeper(|parser| parser.target(&[]))?;
                    self.expect_op(")")?;
                    inner
                }
                false => {
                    let name = self.plain_name()?;
                    if name == "loop" && self.fors > 0 {
                        return self.fail("cannot assign to \"loop\" in a loop");
                    }
                    match self.skip_op(".") {
                        true => Target::Attribute(name, self.name()?),
                        false => Target::Name(name),
                    }
                }
            });
            match self.skip_op(",") {
                true => is_tuple = true,
                false => break,
            }
        }
        match (is_tuple, targets.pop()) {
            (false, Some(one)) => Ok(one),
            (_, last) => {
                targets.extend(last);
                Ok(Target::Tuple(targets))
            }
        }
    }
}
