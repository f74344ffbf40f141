//! Arguments taken apart: every value inside, under a dotted path, in every reading a tool could give it.

use std::borrow::Cow;

use crate::names;

/// Deepest nesting that is followed, counting JSON inside strings.
pub const MAX_DEPTH: usize = 16;
/// Most values in one call.
pub const MAX_LEAVES: usize = 4096;
/// Most readings of one value.
pub const MAX_VIEWS: usize = 24;
/// Longest string that is parsed as JSON or decoded.
pub const MAX_DECODED: usize = 1 << 16;

/// An argument value as the binding hands it over.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Nothing.
    Null,
    /// A truth value.
    Bool(bool),
    /// A number that fits.
    Int(i64),
    /// Any other number.
    Float(f64),
    /// Text.
    Str(String),
    /// Elements; they stand under the path of the list.
    List(Vec<Value>),
    /// Named values.
    Map(Vec<(String, Value)>),
    /// Something that cannot be looked into.
    Opaque,
}

/// One value inside the arguments.
#[derive(Debug)]
pub struct Leaf {
    /// Dotted path of normalised names.
    pub path: String,
    /// The value as text, or None if it cannot be looked into.
    pub text: Option<String>,
}

/// The call cannot be looked through within the bounds of this module.
#[derive(Debug, PartialEq, Eq)]
pub struct TooComplex;

/// Every value inside `arguments`. Strings that hold JSON stand for themselves and for what they hold.
pub fn leaves(arguments: &[(String, Value)]) -> Result<Vec<Leaf>, TooComplex> {
    let mut out = Vec::with_capacity(arguments.len());
    for (name, value) in arguments {
        walk(&names::normalise(name), value, 0, &mut out)?;
    }
    Ok(out)
}

fn walk(path: &str, value: &Value, depth: usize, out: &mut Vec<Leaf>) -> Result<(), TooComplex> {
    if depth > MAX_DEPTH || out.len() >= MAX_LEAVES {
        return Err(TooComplex);
    }
    let text = match value {
        Value::Map(entries) => {
            for (name, inner) in entries {
                walk(&format!("{path}.{}", names::normalise(name)), inner, depth + 1, out)?;
            }
            return Ok(());
        }
        Value::List(items) => {
            for inner in items {
                walk(path, inner, depth + 1, out)?;
            }
            return Ok(());
        }
        Value::Null => Some("null".to_owned()),
        Value::Bool(b) => Some(b.to_string()),
        Value::Int(n) => Some(n.to_string()),
        Value::Float(x) => Some(x.to_string()),
        Value::Opaque => None,
        Value::Str(s) => {
            if let Some(inner) = json_inside(s)? {
                walk(path, &inner, depth + 1, out)?;
            }
            Some(s.clone())
        }
    };
    out.push(Leaf { path: path.to_owned(), text });
    Ok(())
}

/// The value that a string of JSON holds; plain words and numbers are not taken for JSON.
fn json_inside(text: &str) -> Result<Option<Value>, TooComplex> {
    let trimmed = text.trim_start_matches(|c: char| c.is_whitespace() || names::is_ignorable(c));
    if !trimmed.starts_with(['{', '[', '"']) {
        return Ok(None);
    }
    if trimmed.len() > MAX_DECODED {
        return Err(TooComplex);
    }
    // Lenient tools parse a prefix: take the first JSON value and ignore what follows.
    let mut stream = serde_json::Deserializer::from_str(trimmed).into_iter::<serde_json::Value>();
    Ok(match stream.next() {
        Some(Ok(value)) => Some(from_json(value)),
        _ => None,
    })
}

fn from_json(value: serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::Null,
        serde_json::Value::Bool(b) => Value::Bool(b),
        serde_json::Value::Number(n) => {
            n.as_i64().map_or_else(|| Value::Float(n.as_f64().unwrap_or(f64::NAN)), Value::Int)
        }
        serde_json::Value::String(s) => Value::Str(s),
        serde_json::Value::Array(items) => Value::List(items.into_iter().map(from_json).collect()),
        serde_json::Value::Object(map) => Value::Map(map.into_iter().map(|(k, v)| (k, from_json(v))).collect()),
    }
}

/// How a condition reads a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// For `allow`: the readings a correct tool could give it; all must match.
    Strict,
    /// For `deny` and `ask`: also encodings and look-alikes; any may match.
    Generous,
}

/// The readings of `text`, itself first, without repetition.
pub fn views(text: &str, reading: Reading) -> Result<Vec<Cow<'_, str>>, TooComplex> {
    let mut found: Vec<Cow<'_, str>> = vec![Cow::Borrowed(text)];
    if is_plain(text) && (reading == Reading::Strict || !could_be_encoded(text)) {
        return Ok(found);
    }
    if text.len() > MAX_DECODED {
        return Err(TooComplex);
    }
    let mut next = 0;
    while next < found.len() {
        let current = found[next].clone().into_owned();
        next += 1;
        let mut add = |candidate: Option<String>| -> Result<(), TooComplex> {
            if let Some(candidate) = candidate {
                if !found.iter().any(|known| *known == candidate) {
                    if found.len() >= MAX_VIEWS {
                        return Err(TooComplex);
                    }
                    found.push(Cow::Owned(candidate));
                }
            }
            Ok(())
        };
        add((!current.is_ascii()).then(|| names::plain(&current)))?;
        add(percent_decoded(&current))?;
        add(unescaped(&current))?;
        if reading == Reading::Generous {
            add((!current.is_ascii()).then(|| names::fold_lookalikes(&current)))?;
            add(from_base64(&current))?;
            add(from_hex(&current))?;
        }
    }
    Ok(found)
}

fn is_plain(text: &str) -> bool {
    text.is_ascii() && !text.bytes().any(|b| matches!(b, b'%' | b'\\' | b'&'))
}

fn could_be_encoded(text: &str) -> bool {
    let body = text.trim().trim_end_matches('=');
    body.len() >= 8 && body.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/' | b'-' | b'_'))
}

fn percent_decoded(text: &str) -> Option<String> {
    if !text.contains('%') {
        return None;
    }
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let pair = bytes.get(i + 1).zip(bytes.get(i + 2));
        if let (b'%', Some((high, low))) = (bytes[i], pair) {
            if let (Some(high), Some(low)) = (hex_digit(*high), hex_digit(*low)) {
                out.push(high * 16 + low);
                i += 3;
                continue;
            }
        }
        out.push(bytes[i]);
        i += 1;
    }
    (out.len() < bytes.len()).then(|| String::from_utf8_lossy(&out).into_owned())
}

fn hex_digit(byte: u8) -> Option<u8> {
    (byte as char).to_digit(16).map(|d| d as u8)
}

/// `\n`-style, `\xHH`, `\uHHHH` and `&#..;` escapes replaced.
fn unescaped(text: &str) -> Option<String> {
    if !text.contains(['\\', '&']) {
        return None;
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if let Some((decoded, used)) = escape(rest) {
            out.push(decoded);
            rest = &rest[used..];
        } else {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    (out != text).then_some(out)
}

fn escape(text: &str) -> Option<(char, usize)> {
    let hex = |from: usize, digits: usize| {
        let part = text.get(from..from + digits)?;
        let code = u32::from_str_radix(part, 16).ok()?;
        Some((char::from_u32(code)?, from + digits))
    };
    if text.starts_with("\\u{") {
        let end = text.find('}')?;
        return Some((char::from_u32(u32::from_str_radix(&text[3..end], 16).ok()?)?, end + 1));
    }
    if text.starts_with("\\u") {
        return hex(2, 4);
    }
    if text.starts_with("\\x") {
        return hex(2, 2);
    }
    if let Some(body) = text.strip_prefix("&#") {
        let end = body.find(';').filter(|&end| end <= 8)?;
        let digits = &body[..end];
        let code = match digits.strip_prefix(['x', 'X']) {
            Some(digits) => u32::from_str_radix(digits, 16).ok()?,
            None => digits.parse().ok()?,
        };
        return Some((char::from_u32(code)?, end + 3));
    }
    match text.strip_prefix('\\')?.chars().next()? {
        'n' => Some(('\n', 2)),
        't' => Some(('\t', 2)),
        'r' => Some(('\r', 2)),
        '/' => Some(('/', 2)),
        '"' => Some(('"', 2)),
        _ => None,
    }
}

fn readable(bytes: Vec<u8>) -> Option<String> {
    let text = String::from_utf8(bytes).ok()?;
    (text.len() >= 4 && !text.chars().any(|c| c.is_control() && !c.is_whitespace())).then_some(text)
}

fn from_base64(text: &str) -> Option<String> {
    if !could_be_encoded(text) {
        return None;
    }
    let body = text.trim().trim_end_matches('=');
    if body.len() % 4 == 1 {
        return None;
    }
    let mut out = Vec::with_capacity(body.len() * 3 / 4);
    let (mut bits, mut held) = (0u32, 0u32);
    for byte in body.bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' | b'-' => 62,
            _ => 63,
        };
        bits = (bits << 6 | u32::from(value)) & 0xFFFF;
        held += 6;
        if held >= 8 {
            held -= 8;
            out.push((bits >> held) as u8);
        }
    }
    readable(out)
}

fn from_hex(text: &str) -> Option<String> {
    let body = text.trim();
    let body = body.strip_prefix("0x").unwrap_or(body);
    if body.len() < 8 || body.len() % 2 != 0 {
        return None;
    }
    let digits: Option<Vec<u8>> = body.bytes().map(hex_digit).collect();
    readable(digits?.chunks(2).map(|pair| pair[0] * 16 + pair[1]).collect())
}

/// A path without `.`, `..`, doubled or back slashes, `file:` or a trailing slash. Symbolic links are not followed.
///
/// ```
/// assert_eq!(tool_rules::views::normal_path("file:///srv\\data/./x/../../../etc//passwd"), "/etc/passwd");
/// assert_eq!(tool_rules::views::normal_path("a/../../b"), "../b");
/// ```
pub fn normal_path(path: &str) -> String {
    let mut path = path.trim().trim_matches('\0').replace('\\', "/");
    if path.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("file:")) {
        path.drain(..5);
        if let Some(rest) = path.strip_prefix("//") {
            // `file://host/path`: the host is not part of the path.
            path = rest.find('/').map_or_else(String::new, |at| rest[at..].to_owned());
        }
    }
    let absolute = path.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => match parts.last() {
                Some(&last) if last != ".." => {
                    parts.pop();
                }
                _ if absolute => {}
                _ => parts.push(".."),
            },
            _ => parts.push(part),
        }
    }
    let joined = parts.join("/");
    if absolute {
        format!("/{joined}")
    } else {
        joined
    }
}

/// The path readings of a value: generous ones also take a climb out of the unknown working directory to the root.
pub fn path_views(view: &str, reading: Reading, mut visit: impl FnMut(&str)) {
    let normal = normal_path(view);
    visit(&normal);
    if reading == Reading::Generous {
        let mut rest = normal.as_str();
        while let Some(shorter) = rest.strip_prefix("../") {
            rest = shorter;
        }
        if rest.len() < normal.len() {
            visit(&format!("/{rest}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &str) -> Vec<String> {
        views(text, Reading::Generous).unwrap().into_iter().map(Cow::into_owned).collect()
    }

    #[test]
    fn encodings_are_read_through() {
        for text in [
            "%2fetc%2fpasswd",
            "%252fetc%252fpasswd",
            "\\u002fetc\\x2fpasswd",
            "L2V0Yy9wYXNzd2Q=",
            "2f6574632f706173737764",
            "/еtc/pаsswd",
            "/etc/pass\u{200b}wd",
            "&#47;etc&#x2f;passwd",
        ] {
            assert!(all(text).iter().any(|v| v == "/etc/passwd"), "{text}: {:?}", all(text));
        }
    }

    #[test]
    fn json_in_strings_is_opened_at_its_place() {
        let arguments = [("options".to_owned(), Value::Str(r#" {"Path": "[\"/etc\"]"} trailing"#.to_owned()))];
        let found = leaves(&arguments).unwrap();
        assert!(found.iter().any(|l| l.path == "options.path" && l.text.as_deref() == Some("/etc")));
    }

    #[test]
    fn bottomless_arguments_are_refused() {
        let mut value = Value::Null;
        for _ in 0..40 {
            value = Value::List(vec![value]);
        }
        assert_eq!(leaves(&[("x".to_owned(), value)]).unwrap_err(), TooComplex);
    }
}
