//! JSONL: one JSON value a line, read with the line's number at hand.

use crate::{FormatError, Problem, limits};
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// Reads a JSONL file line by line.
///
/// Blank lines are skipped but counted, a byte-order mark and `\r\n` are tolerated, the last line needs no newline.
/// Iterating gives each line's number and value; after an error in one line's JSON the next line can still be read,
/// after any other error the reader is at its end.
#[derive(Debug)]
pub struct JsonlReader<R> {
    reader: R,
    path: PathBuf,
    line_bytes: usize,
    bytes_left: u64,
    file_bytes: u64,
    number: usize,
    buffer: Vec<u8>,
    ended: bool,
}

/// One line that is not blank.
#[derive(Clone, Copy, Debug)]
pub struct JsonlLine<'a> {
    /// Counted from 1.
    pub number: usize,
    /// The line without its end.
    pub text: &'a str,
    path: &'a Path,
}

impl JsonlReader<BufReader<File>> {
    /// Opens a file.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let file = File::open(path).map_err(|e| FormatError::io("open", path, e))?;
        Ok(JsonlReader::new(
            BufReader::with_capacity(1 << 16, file),
            path,
        ))
    }
}

impl<R: BufRead> JsonlReader<R> {
    /// Reads from anything; `name` is what errors call it.
    pub fn new(reader: R, name: impl Into<PathBuf>) -> Self {
        JsonlReader {
            reader,
            path: name.into(),
            line_bytes: limits::JSONL_LINE_BYTES,
            bytes_left: limits::JSONL_FILE_BYTES,
            file_bytes: limits::JSONL_FILE_BYTES,
            number: 0,
            buffer: Vec::new(),
            ended: false,
        }
    }

    /// Sets the most bytes that a line and the whole file may have.
    #[must_use]
    pub fn with_caps(mut self, line_bytes: usize, file_bytes: u64) -> Self {
        self.line_bytes = line_bytes;
        self.file_bytes = file_bytes;
        self.bytes_left = file_bytes;
        self
    }

    /// The next line that is not blank, or `None` at the end.
    pub fn next_line(&mut self) -> Result<Option<JsonlLine<'_>>, FormatError> {
        loop {
            if self.ended || !self.fill()? {
                self.ended = true;
                return Ok(None);
            }
            if !self.buffer.trim_ascii().is_empty() {
                break;
            }
        }
        match std::str::from_utf8(&self.buffer) {
            Ok(text) => Ok(Some(JsonlLine {
                number: self.number,
                text,
                path: &self.path,
            })),
            Err(e) => {
                self.ended = true;
                let offset = e.valid_up_to() as u64;
                Err(self.problem(Problem::NotUtf8 {
                    what: "the text",
                    offset,
                }))
            }
        }
    }

    /// Reads a line into the buffer without its end; false at the end of the file.
    fn fill(&mut self) -> Result<bool, FormatError> {
        self.buffer.clear();
        // One byte more than allowed, and one for the newline, tells a full line from one too long.
        let most = (self.line_bytes as u64)
            .min(self.bytes_left)
            .saturating_add(2);
        let n = (&mut self.reader)
            .take(most)
            .read_until(b'\n', &mut self.buffer)
            .map_err(|e| {
                self.ended = true;
                FormatError::io("read", &self.path, e)
            })?;
        if n == 0 {
            return Ok(false);
        }
        self.number += 1;
        if n as u64 > self.bytes_left {
            self.ended = true;
            let cap = self.file_bytes;
            let found = cap - self.bytes_left + n as u64;
            return Err(self.problem(Problem::OverCap {
                what: "the file's length",
                found,
                cap,
            }));
        }
        self.bytes_left -= n as u64;
        if self.buffer.last() == Some(&b'\n') {
            self.buffer.pop();
        }
        if self.buffer.len() > self.line_bytes {
            self.ended = true;
            let (found, cap) = (self.buffer.len() as u64, self.line_bytes as u64);
            return Err(self.problem(Problem::OverCap {
                what: "the line's length",
                found,
                cap,
            }));
        }
        if self.buffer.last() == Some(&b'\r') {
            self.buffer.pop();
        }
        if self.number == 1 && self.buffer.starts_with(b"\xef\xbb\xbf") {
            self.buffer.drain(..3);
        }
        Ok(true)
    }

    fn problem(&self, problem: Problem) -> FormatError {
        FormatError::Line {
            path: self.path.clone(),
            line: self.number,
            problem,
        }
    }
}

impl JsonlLine<'_> {
    /// The line's value.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, FormatError> {
        serde_json::from_str(self.text).map_err(|e| {
            // The parser counts lines of what it sees, which is one line.
            let message = e.to_string();
            let message = match message.strip_suffix(&format!(" at line 1 column {}", e.column())) {
                Some(rest) => format!("{rest} at column {}", e.column()),
                None => message,
            };
            FormatError::Line {
                path: self.path.to_owned(),
                line: self.number,
                problem: Problem::Json { message },
            }
        })
    }
}

impl<R: BufRead> Iterator for JsonlReader<R> {
    type Item = Result<(usize, serde_json::Value), FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.next_line() {
            Ok(line) => line.map(|line| Ok((line.number, line.parse()?))),
            Err(error) => Some(Err(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8]) -> JsonlReader<&[u8]> {
        JsonlReader::new(text, "rows.jsonl")
    }

    #[test]
    fn lines_are_numbered_and_blank_ones_skipped() {
        let rows: Vec<_> = read(b"\xef\xbb\xbf{\"a\":1}\r\n\n  \n[2]")
            .collect::<Result<_, _>>()
            .unwrap();
        assert_eq!(
            rows,
            [
                (1, serde_json::json!({"a": 1})),
                (4, serde_json::json!([2]))
            ]
        );
    }

    #[test]
    fn an_error_says_file_line_and_column_and_reading_goes_on() {
        let mut reader = read(b"{}\n{\"a\" 1}\n3\n");
        assert!(reader.next().unwrap().is_ok());
        let error = reader.next().unwrap().unwrap_err().to_string();
        assert_eq!(error, "rows.jsonl:2: expected `:` at column 6");
        assert_eq!(reader.next().unwrap().unwrap().0, 3);
        assert!(reader.next().is_none());
    }

    #[test]
    fn a_line_too_long_ends_the_reading() {
        let mut reader = read(b"[1]\n[1234567890]\n[3]\n").with_caps(11, 1000);
        assert!(reader.next().unwrap().is_ok());
        let error = reader.next().unwrap().unwrap_err().to_string();
        assert_eq!(
            error,
            "rows.jsonl:2: the line's length is 12, more than the 11 allowed"
        );
        assert!(reader.next().is_none());
        assert_eq!(
            read(b"[1234567890]\n[3]\n")
                .with_caps(12, 1000)
                .filter(Result::is_ok)
                .count(),
            2
        );
    }

    #[test]
    fn a_file_too_long_ends_the_reading() {
        let rows: Vec<_> = read(b"[1]\n[2]\n[3]\n").with_caps(100, 8).collect();
        assert_eq!(rows.iter().filter(|row| row.is_ok()).count(), 2);
        assert!(
            rows[2]
                .as_ref()
                .unwrap_err()
                .to_string()
                .starts_with("rows.jsonl:3: the file's length")
        );
        assert_eq!(
            read(b"[1]\n[2]\n[3]\n")
                .with_caps(100, 12)
                .filter(Result::is_ok)
                .count(),
            3
        );
    }

    #[test]
    fn text_that_is_not_utf8_is_refused() {
        let mut reader = read(b"\"\xff\"\n1\n");
        assert!(
            reader
                .next()
                .unwrap()
                .unwrap_err()
                .to_string()
                .contains("not UTF-8")
        );
        assert!(reader.next().is_none());
    }
}
