//! The byte alphabet of GPT-2: one printable character for each of the 256 bytes.
//!
//! Bytes that print stay themselves; the 68 others are moved to U+0100 and up, in order.

use std::sync::LazyLock;

/// The character of each byte.
static CHARS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut chars = ['\0'; 256];
    let mut moved = 0;
    for byte in 0..=255u8 {
        chars[usize::from(byte)] = if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            char::from(byte)
        } else {
            moved += 1;
            char::from_u32(0xff + moved).unwrap_or('\0')
        };
    }
    chars
});

/// The byte of a character of the alphabet.
fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        // Moved bytes, in order: 0x00-0x20, 0x7f-0xa0, 0xad.
        n @ 0x100..=0x120 => u8::try_from(n - 0x100).ok(),
        n @ 0x121..=0x142 => u8::try_from(n - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        n => u8::try_from(n).ok().filter(|b| CHARS[usize::from(*b)] == c),
    }
}

/// The bytes a token's spelling stands for. A spelling that leaves the alphabet stands for its own UTF-8.
pub(super) fn of_spelling(spelling: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = spelling.chars().map(byte_of).collect();
    bytes.unwrap_or_else(|| spelling.as_bytes().to_vec())
}

/// The spelling of bytes.
pub(crate) fn spell(bytes: &[u8]) -> String {
    bytes.iter().map(|b| CHARS[usize::from(*b)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_there_and_back() {
        for byte in 0..=255u8 {
            let spelling = spell(&[byte]);
            assert_eq!(spelling.chars().count(), 1);
            assert_eq!(of_spelling(&spelling), [byte]);
        }
        assert_eq!(spell(b" \n"), "ĠĊ");
        assert_eq!(of_spelling("日"), "日".as_bytes());
    }
}
