//! Expressions to a syntax tree, by Jinja's grammar.

use super::Error;
use super::ast::{Arguments, Expr, Filter, Literal};
use super::lexer::Token;
use super::names;
use super::parser::{Parsed, Parser};

impl Parser {
    /// One expression, or several as a tuple.
    pub(super) fn tuple(&mut self, ends: &[&str], parentheses: bool, conditional: bool) -> Parsed<Expr> {
        let mut all = Vec::new();
        let mut is_tuple = false;
        loop {
            let is_end = self.is_op(")")
                || matches!(self.peek(), None | Some(Token::VariableEnd | Token::BlockEnd))
                || ends.iter().any(|end| self.is_name(end));
            if is_end {
                break;
            }
            all.push(match conditional || parentheses {
                true => self.expression()?,
                false => self.deeper(Self::or)?,
            });
            match self.skip_op(",") {
                true => is_tuple = true,
                false => break,
            }
        }
        match (is_tuple, all.pop()) {
            (false, Some(one)) => Ok(one),
            (false, None) if !parentheses => self.unexpected("an expression"),
            (_, last) => {
                all.extend(last);
                Ok(Expr::Tuple(all))
            }
        }
    }

    pub(super) fn expression(&mut self) -> Parsed<Expr> {
        self.deeper(|parser| {
            let mut value = parser.or()?;
            while parser.skip_name("if") {
                parser.operator()?;
                parser.branches += 1;
                let condition = parser.or()?;
                let otherwise = match parser.skip_name("else") {
                    true => Some(Box::new(parser.expression()?)),
                    false => None,
                };
                parser.branches -= 1;
                value = Expr::If(Box::new(condition), Box::new(value), otherwise);
            }
            Ok(value)
        })
    }

    fn or(&mut self) -> Parsed<Expr> {
        let mut left = self.and()?;
        while self.skip_name("or") {
            self.operator()?;
            left = Expr::Or(Box::new(left), Box::new(self.and()?));
        }
        Ok(left)
    }

    fn and(&mut self) -> Parsed<Expr> {
        let mut left = self.not()?;
        while self.skip_name("and") {
            self.operator()?;
            left = Expr::And(Box::new(left), Box::new(self.not()?));
        }
        Ok(left)
    }

    fn not(&mut self) -> Parsed<Expr> {
        match self.skip_name("not") {
            true => Ok(Expr::Not(Box::new(self.deeper(Self::not)?))),
            false => self.compare(),
        }
    }

    fn compare(&mut self) -> Parsed<Expr> {
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let op = match self.peek() {
                Some(Token::Op(op)) if ["==", "!=", "<", "<=", ">", ">="].contains(op) => *op,
                Some(Token::Name(name)) if name == "in" => "in",
                Some(Token::Name(name)) if name == "not" => match self.tokens.get(self.at + 1) {
                    Some((Token::Name(name), _)) if name == "in" => "not in",
                    _ => break,
                },
                _ => break,
            };
            self.operator()?;
            self.at += 1 + usize::from(op == "not in");
            rest.push((op, self.sum()?));
        }
        Ok(match rest.is_empty() {
            true => first,
            false => Expr::Compare(Box::new(first), rest),
        })
    }

    fn binary(&mut self, ops: &[&'static str], operand: fn(&mut Self) -> Parsed<Expr>) -> Parsed<Expr> {
        let mut left = operand(self)?;
        while let Some(op) = ops.iter().copied().find(|op| self.is_op(op)) {
            self.operator()?;
            self.at += 1;
            left = Expr::Binary(op, Box::new(left), Box::new(operand(self)?));
        }
        Ok(left)
    }

    fn sum(&mut self) -> Parsed<Expr> {
        self.binary(&["+", "-"], Self::concat)
    }

    fn concat(&mut self) -> Parsed<Expr> {
        let mut all = vec![self.product()?];
        while self.skip_op("~") {
            all.push(self.product()?);
        }
        match all.len() {
            1 => Ok(all.remove(0)),
            _ => Ok(Expr::Concat(all)),
        }
    }

    fn product(&mut self) -> Parsed<Expr> {
        self.binary(&["*", "/", "//", "%"], Self::power)
    }

    fn power(&mut self) -> Parsed<Expr> {
        let power = self.binary(&["**"], |parser| parser.unary(true))?;
        // Jinja compiles the base to a Python constant, whose sign then applies after the power.
        if let Expr::Binary("**", base, exponent) = &power
            && matches!(&**base, Expr::Unary("-", number) if matches!(**number, Expr::Literal(_)))
            && !matches!(**exponent, Expr::Literal(_))
        {
            return Err(Error::unsupported("a negative number to a power that is not a number"));
        }
        Ok(power)
    }

    fn unary(&mut self, with_filter: bool) -> Parsed<Expr> {
        let value = if self.skip_op("-") {
            Expr::Unary("-", Box::new(self.deeper(|parser| parser.unary(false))?))
        } else if self.skip_op("+") {
            Expr::Unary("+", Box::new(self.deeper(|parser| parser.unary(false))?))
        } else {
            self.primary()?
        };
        let value = self.postfix(value)?;
        match with_filter {
            true => self.filters_and_tests(value),
            false => Ok(value),
        }
    }

    fn primary(&mut self) -> Parsed<Expr> {
        let literal = match self.next() {
            Some(Token::Name(name)) => match name.as_str() {
                "true" | "True" => Literal::Bool(true),
                "false" | "False" => Literal::Bool(false),
                "none" | "None" => Literal::None,
                _ => {
                    self.names.push(name.clone());
                    return Ok(Expr::Name(name));
                }
            },
            Some(Token::Str(mut text)) => {
                while let Some(Token::Str(more)) = self.peek() {
                    text.push_str(more);
                    self.at += 1;
                }
                Literal::Str(text.into())
            }
            Some(Token::Int(number)) => Literal::Int(number),
            Some(Token::Float(number)) => Literal::Float(number),
            Some(Token::Op("(")) => {
                let inner = self.deeper(|parser| parser.tuple(&[], true, true))?;
                self.expect_op(")")?;
                return Ok(inner);
            }
            Some(Token::Op("[")) => return Ok(Expr::List(self.list("]")?)),
            Some(Token::Op("{")) => {
                let mut pairs = Vec::new();
                while !self.is_op("}") {
                    if !pairs.is_empty() {
                        self.expect_op(",")?;
                        if self.is_op("}") {
                            break;
                        }
                    }
                    let key = self.expression()?;
                    self.expect_op(":")?;
                    pairs.push((key, self.expression()?));
                }
                self.at += 1;
                return Ok(Expr::Dict(pairs));
            }
            _ => {
                self.at -= 1;
                return self.unexpected("an expression");
            }
        };
        Ok(Expr::Literal(literal))
    }

    fn list(&mut self, end: &str) -> Parsed<Vec<Expr>> {
        let mut all = Vec::new();
        while !self.is_op(end) {
            if !all.is_empty() {
                self.expect_op(",")?;
                if self.is_op(end) {
                    break;
                }
            }
            all.push(self.expression()?);
        }
        self.at += 1;
        Ok(all)
    }

    fn postfix(&mut self, mut value: Expr) -> Parsed<Expr> {
        loop {
            value = if self.skip_op(".") {
                match self.next() {
                    Some(Token::Name(name)) => Expr::Attribute(Box::new(value), name),
                    Some(Token::Int(number)) => {
                        Expr::Item(Box::new(value), Box::new(Expr::Literal(Literal::Int(number))))
                    }
                    _ => {
                        self.at -= 1;
                        return self.unexpected("a name or a number");
                    }
                }
            } else if self.skip_op("[") {
                self.subscript(value)?
            } else if self.is_op("(") {
                Expr::Call(Box::new(value), self.arguments()?)
            } else {
                return Ok(value);
            };
            self.operator()?;
        }
    }

    fn subscript(&mut self, value: Expr) -> Parsed<Expr> {
        let mut parts: [Option<Box<Expr>>; 3] = [None, None, None];
        let mut colons = 0;
        loop {
            if self.skip_op("]") {
                break;
            }
            if self.is_op(":") && colons < 2 {
                self.at += 1;
                colons += 1;
            } else if parts[colons].is_none() {
                parts[colons] = Some(Box::new(self.expression()?));
            } else if self.is_op(",") {
                return Err(Error::unsupported("an item by several indices"));
            } else {
                return self.unexpected("\"]\"");
            }
        }
        match (colons, parts) {
            (0, [Some(index), ..]) => Ok(Expr::Item(Box::new(value), index)),
            (0, _) => self.unexpected("an expression"),
            (_, parts) => Ok(Expr::Slice(Box::new(value), parts)),
        }
    }

    pub(super) fn arguments(&mut self) -> Parsed<Arguments> {
        self.expect_op("(")?;
        let mut arguments = Arguments::default();
        let mut first = true;
        while !self.is_op(")") {
            if !std::mem::take(&mut first) {
                self.expect_op(",")?;
                if self.is_op(")") {
                    break;
                }
            }
            let out_of_order = |arguments: &Arguments| arguments.dict.is_some();
            if self.skip_op("*") {
                if arguments.list.is_some() || out_of_order(&arguments) {
                    return self.fail("invalid syntax for a call");
                }
                arguments.list = Some(Box::new(self.expression()?));
            } else if self.skip_op("**") {
                if out_of_order(&arguments) {
                    return self.fail("invalid syntax for a call");
                }
                arguments.dict = Some(Box::new(self.expression()?));
            } else if let (Some(Token::Name(name)), Some((Token::Op("="), _))) =
                (self.peek(), self.tokens.get(self.at + 1))
            {
                let name = name.clone();
                if out_of_order(&arguments) {
                    return self.fail("invalid syntax for a call");
                }
                if arguments.named.iter().any(|(other, _)| *other == name) {
                    return self.fail(format!("the argument {name:?} is given twice"));
                }
                self.at += 2;
                arguments.named.push((name, self.expression()?));
            } else {
                if arguments.list.is_some() || out_of_order(&arguments) || !arguments.named.is_empty() {
                    return self.fail("invalid syntax for a call");
                }
                arguments.positional.push(self.expression()?);
            }
        }
        self.expect_op(")")?;
        Ok(arguments)
    }

    fn filters_and_tests(&mut self, mut value: Expr) -> Parsed<Expr> {
        loop {
            value = if self.skip_op("|") {
                Expr::Filter(Box::new(value), self.filter()?)
            } else if self.skip_name("is") {
                self.test(value)?
            } else if self.is_op("(") {
                Expr::Call(Box::new(value), self.arguments()?)
            } else {
                return Ok(value);
            };
            self.operator()?;
        }
    }

    fn dotted_name(&mut self) -> Parsed<String> {
        let mut name = self.name()?;
        while self.skip_op(".") {
            name = name + "." + &self.name()?;
        }
        Ok(name)
    }

    /// The filter after a `|`.
    pub(super) fn filter(&mut self) -> Parsed<Filter> {
        let name = self.dotted_name()?;
        if self.branches == 0 && !names::FILTERS.contains(&name.as_str()) {
            return self.fail(format!("no filter named {name:?}"));
        }
        let arguments = match self.is_op("(") {
            true => self.arguments()?,
            false => Arguments::default(),
        };
        Ok(Filter { name, arguments })
    }

    /// The test after an `is`.
    fn test(&mut self, value: Expr) -> Parsed<Expr> {
        let negated = self.skip_name("not");
        let name = self.dotted_name()?;
        if self.branches == 0 && !names::TESTS.contains(&name.as_str()) {
            return self.fail(format!("no test named {name:?}"));
        }
        let mut arguments = Arguments::default();
        let begins_value = match self.peek() {
            Some(Token::Op("(")) => {
                arguments = self.arguments()?;
                false
            }
            Some(Token::Name(name)) if name == "is" => return self.fail("tests cannot be chained with \"is\""),
            // A condition after the test is not its argument, but Jinja parses it as one and then fails.
            Some(Token::Name(name)) => !["else", "or", "and"].contains(&name.as_str()),
            Some(Token::Str(_) | Token::Int(_) | Token::Float(_) | Token::Op("[" | "{")) => true,
            _ => false,
        };
        if begins_value {
            let argument = self.deeper(Self::primary)?;
            arguments.positional.push(self.postfix(argument)?);
        }
        let test = Expr::Test(Box::new(value), name, arguments);
        Ok(match negated {
            true => Expr::Not(Box::new(test)),
            false => test,
        })
    }
}
