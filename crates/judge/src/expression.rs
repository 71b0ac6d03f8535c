//! Arithmetic over scores: `0.7 * accuracy + 0.3 * min(style, 1)`.
//!
//! Numbers, names, `+ - * / ^` (and `**`), parentheses, and the functions `min`, `max` (of one or more), `abs`,
//! `floor`, `ceil`, `exp`, `sqrt`, `log`. Nothing else can be said, so there is nothing to guard.

/// The longest formula, in bytes, and how deep it may be nested.
const BYTES_MAX: usize = 10_000;
const DEPTH_MAX: usize = 100;

/// Why a formula has no value.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ExpressionError {
    /// Something else was expected.
    #[error("at character {at}: {what}")]
    Syntax {
        /// Where, counted from 1.
        at: usize,
        /// What is wrong.
        what: String,
    },
    /// A name that stands for nothing.
    #[error("`{0}` is not the name of a grader")]
    UnknownName(String),
    /// Division by zero, the root of a negative number, too large a number.
    #[error("the result is not a number: {0}")]
    NotANumber(f64),
}

#[derive(Debug, Clone, PartialEq)]
enum Node {
    Number(f64),
    Name(String),
    Negate(Box<Node>),
    Binary(char, Box<Node>, Box<Node>),
    Call(Function, Vec<Node>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Function {
    Min,
    Max,
    Abs,
    Floor,
    Ceil,
    Exp,
    Sqrt,
    Log,
}

impl Function {
    const ALL: [(&'static str, Function); 8] = [
        ("min", Function::Min),
        ("max", Function::Max),
        ("abs", Function::Abs),
        ("floor", Function::Floor),
        ("ceil", Function::Ceil),
        ("exp", Function::Exp),
        ("sqrt", Function::Sqrt),
        ("log", Function::Log),
    ];
}

/// A formula.
#[derive(Debug, Clone, PartialEq)]
pub struct Expression {
    root: Node,
}

impl Expression {
    /// Reads a formula.
    pub fn parse(text: &str) -> Result<Expression, ExpressionError> {
        let mut parser = Parser {
            chars: text.chars().collect(),
            at: 0,
            depth: 0,
        };
        if text.len() > BYTES_MAX {
            return Err(parser.error(format!("a formula has at most {BYTES_MAX} bytes")));
        }
        let root = parser.sum()?;
        match parser.peek() {
            None => Ok(Expression { root }),
            Some(c) => Err(parser.error(format!("`{c}` is not expected"))),
        }
    }

    /// The names in it.
    pub fn names(&self) -> Vec<&str> {
        fn walk<'a>(node: &'a Node, names: &mut Vec<&'a str>) {
            match node {
                Node::Number(_) => {}
                Node::Name(name) => names.push(name),
                Node::Negate(inner) => walk(inner, names),
                Node::Binary(_, a, b) => {
                    walk(a, names);
                    walk(b, names);
                }
                Node::Call(_, inner) => inner.iter().for_each(|node| walk(node, names)),
            }
        }
        let mut names = Vec::new();
        walk(&self.root, &mut names);
        names
    }

    /// Its value, where names have these.
    pub fn value(&self, of: impl Fn(&str) -> Option<f64>) -> Result<f64, ExpressionError> {
        let value = evaluate(&self.root, &of)?;
        if value.is_finite() {
            Ok(value)
        } else {
            Err(ExpressionError::NotANumber(value))
        }
    }
}

fn evaluate(node: &Node, of: &dyn Fn(&str) -> Option<f64>) -> Result<f64, ExpressionError> {
    Ok(match node {
        Node::Number(number) => *number,
        Node::Name(name) => of(name).ok_or_else(|| ExpressionError::UnknownName(name.clone()))?,
        Node::Negate(inner) => -evaluate(inner, of)?,
        Node::Binary(sign, a, b) => {
            let (a, b) = (evaluate(a, of)?, evaluate(b, of)?);
            match sign {
                '+' => a + b,
                '-' => a - b,
                '*' => a * b,
                '/' => a / b,
                _ => a.powf(b),
            }
        }
        Node::Call(function, inner) => {
            let values: Result<Vec<f64>, _> = inner.iter().map(|node| evaluate(node, of)).collect();
            let values = values?;
            let first = values.first().copied().unwrap_or(f64::NAN);
            match function {
                Function::Min => values.into_iter().fold(f64::INFINITY, f64::min),
                Function::Max => values.into_iter().fold(f64::NEG_INFINITY, f64::max),
                Function::Abs => first.abs(),
                Function::Floor => first.floor(),
                Function::Ceil => first.ceil(),
                Function::Exp => first.exp(),
                Function::Sqrt => first.sqrt(),
                Function::Log => first.ln(),
            }
        }
    })
}

struct Parser {
    chars: Vec<char>,
    at: usize,
    depth: usize,
}

impl Parser {
    fn error(&self, what: impl Into<String>) -> ExpressionError {
        ExpressionError::Syntax {
            at: self.at + 1,
            what: what.into(),
        }
    }

    /// The next character that is no space.
    fn peek(&mut self) -> Option<char> {
        while self.chars.get(self.at).is_some_and(|c| c.is_whitespace()) {
            self.at += 1;
        }
        self.chars.get(self.at).copied()
    }

    fn take(&mut self, wanted: char) -> bool {
        let is_there = self.peek() == Some(wanted);
        if is_there {
            self.at += 1;
        }
        is_there
    }

    fn sum(&mut self) -> Result<Node, ExpressionError> {
        let mut left = self.product()?;
        while let Some(sign @ ('+' | '-')) = self.peek() {
            self.at += 1;
            left = Node::Binary(sign, Box::new(left), Box::new(self.product()?));
        }
        Ok(left)
    }

    fn product(&mut self) -> Result<Node, ExpressionError> {
        let mut left = self.signed()?;
        while let Some(sign @ ('*' | '/')) = self.peek() {
            self.at += 1;
            left = Node::Binary(sign, Box::new(left), Box::new(self.signed()?));
        }
        Ok(left)
    }

    /// A sign binds less than a power: -2^2 is -4.
    fn signed(&mut self) -> Result<Node, ExpressionError> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(self.error("the formula is nested too deeply"));
        }
        let node = if self.take('-') {
            Node::Negate(Box::new(self.signed()?))
        } else if self.take('+') {
            self.signed()?
        } else {
            self.power()?
        };
        self.depth -= 1;
        Ok(node)
    }

    fn power(&mut self) -> Result<Node, ExpressionError> {
        let base = self.atom()?;
        let is_double = self.peek() == Some('*') && self.chars.get(self.at + 1) == Some(&'*');
        if is_double {
            self.at += 2;
        } else if !self.take('^') {
            return Ok(base);
        }
        Ok(Node::Binary('^', Box::new(base), Box::new(self.signed()?)))
    }

    fn atom(&mut self) -> Result<Node, ExpressionError> {
        let Some(first) = self.peek() else {
            return Err(self.error("the formula ends where a value should be"));
        };
        if self.take('(') {
            let inner = self.sum()?;
            return if self.take(')') {
                Ok(inner)
            } else {
                Err(self.error("`)` is missing"))
            };
        }
        let begin = self.at;
        let word = |parser: &mut Parser, goes_on: &dyn Fn(char) -> bool| -> String {
            while parser.chars.get(parser.at).is_some_and(|c| goes_on(*c)) {
                parser.at += 1;
            }
            parser.chars[begin..parser.at].iter().collect()
        };
        if first.is_ascii_digit() || first == '.' {
            let mut text = word(self, &|c| c.is_ascii_digit() || c == '.');
            if let Some(e @ ('e' | 'E')) = self.chars.get(self.at) {
                let sign = self
                    .chars
                    .get(self.at + 1)
                    .filter(|c| matches!(c, '+' | '-'));
                let digits = self.at + 1 + usize::from(sign.is_some());
                if self.chars.get(digits).is_some_and(char::is_ascii_digit) {
                    text.push(*e);
                    text.extend(sign);
                    self.at = digits;
                    while let Some(c) = self.chars.get(self.at).filter(|c| c.is_ascii_digit()) {
                        text.push(*c);
                        self.at += 1;
                    }
                }
            }
            let number = text.parse().map_err(|_| {
                self.at = begin;
                self.error(format!("`{text}` is not a number"))
            });
            return number.map(Node::Number);
        }
        if !first.is_alphabetic() && first != '_' {
            return Err(self.error(format!("`{first}` is not expected")));
        }
        let name = word(self, &|c| c.is_alphanumeric() || c == '_');
        if !self.take('(') {
            return Ok(Node::Name(name));
        }
        let known = Function::ALL.iter().find(|(known, _)| *known == name);
        let Some((_, function)) = known else {
            self.at = begin;
            let all: Vec<&str> = Function::ALL.iter().map(|(name, _)| *name).collect();
            let message = format!("`{name}` is not a function; there are {}", all.join(", "));
            return Err(self.error(message));
        };
        let mut inner = vec![self.sum()?];
        while self.take(',') {
            inner.push(self.sum()?);
        }
        if !self.take(')') {
            return Err(self.error("`)` is missing"));
        }
        if inner.len() > 1 && !matches!(function, Function::Min | Function::Max) {
            return Err(self.error(format!("`{name}` takes one value")));
        }
        Ok(Node::Call(*function, inner))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn value(text: &str) -> Result<f64, ExpressionError> {
        Expression::parse(text)?.value(|name| match name {
            "a" => Some(0.5),
            "b_2" => Some(2.0),
            _ => None,
        })
    }

    #[test]
    fn arithmetic_as_in_school() {
        for (text, want) in [
            ("1 + 2 * 3", 7.0),
            ("(1 + 2) * 3", 9.0),
            ("8 / 4 / 2", 1.0),
            ("2 - 3 - 4", -5.0),
            ("2 ^ 3 ^ 2", 512.0),
            ("2 ** 3", 8.0),
            ("-2 ^ 2", -4.0),
            ("2 ^ -1", 0.5),
            ("a * b_2", 1.0),
            ("min(3, a, 1) + max(1, 2)", 2.5),
            ("sqrt(4) + abs(-1) + floor(1.9) + ceil(0.1)", 5.0),
            ("log(exp(1e0))", 1.0),
            ("1.5e-1", 0.15),
        ] {
            assert_eq!(value(text), Ok(want), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, want) in [
            ("", "ends where"),
            ("1 +", "ends where"),
            ("1 2", "at character 3"),
            ("(1", "`)` is missing"),
            ("foo(1)", "`foo` is not a function"),
            ("abs(1, 2)", "takes one"),
            ("c + 1", "`c` is not the name"),
            ("1 / 0", "not a number"),
            ("sqrt(-1)", "not a number"),
            ("1.2.3", "`1.2.3` is not a number"),
            ("a; b", "`;` is not expected"),
            ("a.b", "`.` is not expected"),
        ] {
            let error = value(text).unwrap_err().to_string();
            assert!(error.contains(want), "{text}: {error}");
        }
        assert!(value(&"(".repeat(5000)).is_err());
        assert!(value(&"-".repeat(9000)).is_err());
        assert!(value(&"1+".repeat(9000)).is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[-+*/^().,0-9a-e _]{0,60}") {
            let _ = value(&text);
        }
    }
}
