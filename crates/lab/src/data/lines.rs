//! Lines of a JSONL file: numbered, capped, decoded, blank ones skipped.

use std::io::{BufRead, BufReader, Read};

use super::RowProblem;

/// The longest line that is read, in bytes: far above any row that fits a small model's context.
pub const MAX_LINE_BYTES: usize = 4 << 20;

/// A trouble with the lines: of the file as a whole, or of one line.
pub(super) enum LineTrouble {
    Io(std::io::Error),
    Row(usize, RowProblem),
}

/// Hands each non-blank line with its number (from 1) to `each`, until one fails.
pub(super) fn for_each_line(
    input: impl Read,
    mut each: impl FnMut(usize, &str) -> Result<(), RowProblem>,
) -> Result<(), LineTrouble> {
    let mut reader = BufReader::with_capacity(1 << 16, input);
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        // One byte over the cap tells a line that is too long from one that just fits (the end of line is free).
        let n_read = (&mut reader)
            .take(MAX_LINE_BYTES as u64 + 2)
            .read_until(b'\n', &mut bytes)
            .map_err(LineTrouble::Io)?;
        if n_read == 0 {
            break;
        }
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
        }
        if bytes.last() == Some(&b'\r') {
            bytes.pop();
        }
        if bytes.len() > MAX_LINE_BYTES {
            return Err(LineTrouble::Row(
                line,
                RowProblem::LineTooLong {
                    max_bytes: MAX_LINE_BYTES,
                },
            ));
        }
        let content = match bytes.strip_prefix(b"\xef\xbb\xbf") {
            Some(rest) if line == 1 => rest,
            _ => &bytes[..],
        };
        let text = std::str::from_utf8(content).map_err(|error| {
            LineTrouble::Row(
                line,
                RowProblem::NotUtf8 {
                    column: error.valid_up_to() + 1,
                },
            )
        })?;
        if !text.trim().is_empty() {
            each(line, text).map_err(|problem| LineTrouble::Row(line, problem))?;
        }
    }
    Ok(())
}
