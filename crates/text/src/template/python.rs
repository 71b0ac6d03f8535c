//! What Python would print: `str()` of a value, and `json.dumps`.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// Deepest nesting written.
const MAX_DEPTH: usize = 64;
/// Most bytes written for one value.
const MAX_BYTES: usize = 16 << 20;

/// `str(value)`: what `{{ value }}` shows.
pub(super) fn display(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::Undefined => Ok(String::new()),
        ValueKind::String => Ok(value.as_str().unwrap_or_default().to_string()),
        ValueKind::Seq | ValueKind::Map | ValueKind::Bool | ValueKind::None | ValueKind::Number => {
            let mut out = String::new();
            repr(value, &mut out, 0)?;
            Ok(out)
        }
        ValueKind::Invalid => Err(Error::new(ErrorKind::InvalidOperation, value.to_string())),
        _ => Ok(value.to_string()),
    }
}

fn check(out: &str, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH || out.len() > MAX_BYTES {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "a value is too deep or too large to write",
        ));
    }
    Ok(())
}

/// `repr(value)`.
fn repr(value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
    check(out, depth)?;
    match value.kind() {
        ValueKind::None | ValueKind::Undefined => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let quote = if text.contains('\'') && !text.contains('"') {
                '"'
            } else {
                '\''
            };
            out.push(quote);
            for c in text.chars() {
                match c {
                    '\\' => out.push_str("\\\\"),
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\t' => out.push_str("\\t"),
                    c if c == quote => out.extend(['\\', c]),
                    c if c.is_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
                    c => out.push(c),
                }
            }
            out.push(quote);
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                repr(&key, out, depth + 1)?;
                out.push_str(": ");
                repr(&value.get_item(&key)?, out, depth + 1)?;
            }
            out.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let (open, close) = if value.is_tuple() {
                ('(', ')')
            } else {
                ('[', ']')
            };
            out.push(open);
            let mut n = 0;
            for item in value.try_iter()? {
                if n > 0 {
                    out.push_str(", ");
                }
                repr(&item, out, depth + 1)?;
                n += 1;
            }
            if value.is_tuple() && n == 1 {
                out.push(',');
            }
            out.push(close);
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// An integer's digits, or the shortest decimal as Python lays it out.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(x) => float(x),
        Err(_) => value.to_string(),
    }
}

/// `repr` of a float: the shortest digits that read back, in exponent form below 1e-4 and from 1e16.
fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf".into() } else { "-inf".into() };
    }
    if x != 0.0 && !(1e-4..1e16).contains(&x.abs()) {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let exponent: i32 = exponent.parse().unwrap_or(0);
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let text = format!("{x}");
    if text.contains('.') {
        text
    } else {
        format!("{text}.0")
    }
}

/// How `json.dumps` lays a value out.
struct Layout {
    item_separator: String,
    key_separator: String,
    indent: Option<String>,
    ensure_ascii: bool,
    sort_keys: bool,
}

/// The `tojson` filter as Hugging Face defines it: `json.dumps` without HTML escaping, non-ASCII kept.
pub(super) fn tojson(value: Value, indent: Option<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let indent = match indent.filter(|v| !v.is_none() && !v.is_undefined()) {
        Some(v) => Some(v),
        None => kwargs
            .get::<Option<Value>>("indent")?
            .filter(|v| !v.is_none() && !v.is_undefined()),
    };
    let indent = match indent {
        None => None,
        Some(v) => match (v.as_str(), v.as_usize()) {
            (Some(text), _) if text.len() <= 32 => Some(text.to_string()),
            (_, Some(n)) if n <= 32 => Some(" ".repeat(n)),
            _ => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    "tojson: bad indent",
                ));
            }
        },
    };
    let separators = kwargs.get::<Option<Vec<String>>>("separators")?;
    let (item_separator, key_separator) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "tojson: separators must be a pair",
            ));
        }
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    let layout = Layout {
        item_separator,
        key_separator,
        indent,
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    let mut out = String::new();
    json(&value, &layout, &mut out, 0)?;
    Ok(out)
}

fn json(value: &Value, layout: &Layout, out: &mut String, depth: usize) -> Result<(), Error> {
    check(out, depth)?;
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&match number(value).as_str() {
            "nan" => "NaN".to_string(),
            "inf" => "Infinity".to_string(),
            "-inf" => "-Infinity".to_string(),
            other => other.to_string(),
        }),
        ValueKind::String => json_string(value.as_str().unwrap_or_default(), layout, out),
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if layout.sort_keys {
                keys.sort();
            }
            let empty = keys.is_empty();
            out.push('{');
            for (i, key) in keys.into_iter().enumerate() {
                between(i, layout, out, depth + 1);
                match key.as_str() {
                    Some(text) => json_string(text, layout, out),
                    None => json_string(&json_key(&key), layout, out),
                }
                out.push_str(&layout.key_separator);
                json(&value.get_item(&key)?, layout, out, depth + 1)?;
            }
            close(empty, '}', layout, out, depth);
        }
        ValueKind::Seq => {
            out.push('[');
            let mut n = 0;
            for item in value.try_iter()? {
                between(n, layout, out, depth + 1);
                json(&item, layout, out, depth + 1)?;
                n += 1;
            }
            close(n == 0, ']', layout, out, depth);
        }
        kind => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("tojson: {kind} is not JSON serializable"),
            ));
        }
    }
    Ok(())
}

/// A key that is not a string, as Python turns it into one.
fn json_key(key: &Value) -> String {
    match key.kind() {
        ValueKind::None => "null".into(),
        ValueKind::Bool => if key.is_true() { "true" } else { "false" }.into(),
        _ => number(key),
    }
}

fn between(i: usize, layout: &Layout, out: &mut String, depth: usize) {
    if i > 0 {
        out.push_str(&layout.item_separator);
    }
    newline(layout, out, depth);
}

fn close(empty: bool, bracket: char, layout: &Layout, out: &mut String, depth: usize) {
    if !empty {
        newline(layout, out, depth);
    }
    out.push(bracket);
}

fn newline(layout: &Layout, out: &mut String, depth: usize) {
    if let Some(indent) = &layout.indent {
        out.push('\n');
        for _ in 0..depth {
            out.push_str(indent);
        }
    }
}

fn json_string(text: &str, layout: &Layout, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if u32::from(c) < 0x20 => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            // Python counts DEL as printable here and leaves it.
            c if layout.ensure_ascii && !c.is_ascii() => {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_print_as_in_python() {
        for (x, text) in [
            (0.0, "0.0"),
            (1.0, "1.0"),
            (-0.5, "-0.5"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.25e120, "1.25e+120"),
            (0.1 + 0.2, "0.30000000000000004"),
        ] {
            assert_eq!(float(x), text);
        }
    }

    #[test]
    fn values_print_as_in_python() {
        let v = Value::from(minijinja::value::Serde(
            serde_json::json!({"a": [1, true, null, "it's", "q\"'"], "b": {}}),
        ));
        assert_eq!(
            display(&v).unwrap(),
            r#"{'a': [1, True, None, "it's", 'q"\''], 'b': {}}"#
        );
    }
}
