//! Escapes in text from the command line, as llama.cpp reads them in reverse prompts and sequence breakers.
//!
//! `\n`, `\r`, `\t`, `\\`, `\'`, `\"` and `\xHH`, a byte by two hexadecimal digits; any other backslash stays as it is.

/// Bytes given by `\xHH` that are not text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the bytes that \\x gives in {text:?} are not UTF-8")]
pub struct EscapeError {
    /// The text as given.
    pub text: String,
}

/// The text with its escapes replaced. llama.cpp: `string_process_escapes` in `common/common.cpp`.
pub fn unescape(text: &str) -> Result<String, EscapeError> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let (byte, length) = match (bytes[at], bytes.get(at + 1)) {
            (b'\\', Some(b'n')) => (b'\n', 2),
            (b'\\', Some(b'r')) => (b'\r', 2),
            (b'\\', Some(b't')) => (b'\t', 2),
            (b'\\', Some(quoted @ (b'\\' | b'\'' | b'"'))) => (*quoted, 2),
            (b'\\', Some(b'x')) => match bytes.get(at + 2..at + 4).and_then(hex) {
                Some(byte) => (byte, 4),
                None => (b'\\', 1),
            },
            (byte, _) => (byte, 1),
        };
        out.push(byte);
        at += length;
    }
    String::from_utf8(out).map_err(|_| EscapeError { text: text.to_string() })
}

/// Two digits, without the sign or spaces that a number might have.
fn hex(digits: &[u8]) -> Option<u8> {
    let digit = |d: u8| char::from(d).to_digit(16);
    Some((digit(digits[0])? * 16 + digit(digits[1])?) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_llama_cpps() {
        for (given, text) in [
            (r"\n", "\n"),
            (r"a\r\n\tb", "a\r\n\tb"),
            (r#"\\n \" \'"#, r#"\n " '"#),
            (r"\x41\x0a", "A\n"),
            (r"\xF0\x9f\x98\x80!", "😀!"),
            // Not escapes in llama.cpp: unchanged.
            (r"\d \0 \u0041 \é", r"\d \0 \u0041 \é"),
            (r"\x4", r"\x4"),
            (r"\xg1 \x+1", r"\xg1 \x+1"),
            ("\\", "\\"),
            ("", ""),
            ("é\n", "é\n"),
        ] {
            assert_eq!(unescape(given).as_deref(), Ok(text), "{given}");
        }
        let error = unescape(r"a\xff").unwrap_err().to_string();
        assert_eq!(error, r#"the bytes that \x gives in "a\\xff" are not UTF-8"#);
    }
}
