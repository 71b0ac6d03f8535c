//! Reads the labelled address corpora: XML in which every token of an address is wrapped in its tag.
//!
//! ```xml
//! <AddressString><AddressNumber>19</AddressNumber> <StreetName>Main</StreetName>, <PlaceName>Deale</PlaceName></AddressString>
//! ```
//!
//! The model is shown the whole text of the element, separators outside the tags included, with every
//! run of white space made one space. Tokens are trimmed the same way and empty ones are dropped.

use super::answer::{TAGS, Token};

/// One human-labelled address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Labelled {
    /// The address as it was written, white space collapsed.
    pub(crate) text: String,
    /// Its tagged tokens in order.
    pub(crate) tokens: Vec<Token>,
    /// Line of the source file, for messages and for tracing a row back.
    pub(crate) line: u32,
}

/// Why a corpus could not be read; every variant names file and line.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum XmlError {
    /// The file is not well-formed XML.
    #[error("{file}: not well-formed: {reason}")]
    Malformed { file: String, reason: String },
    /// The root or a child of the root is another element than expected.
    #[error("{file}:{line}: expected <{expected}>, found <{found}>")]
    Element {
        file: String,
        line: u32,
        expected: &'static str,
        found: String,
    },
    /// A token carries a tag that the answer's schema does not know.
    #[error("{file}:{line}: unknown tag <{tag}>")]
    UnknownTag {
        file: String,
        line: u32,
        tag: String,
    },
    /// A token has elements inside.
    #[error("{file}:{line}: <{tag}> has elements inside; a token is plain text")]
    Nested {
        file: String,
        line: u32,
        tag: String,
    },
    /// An address without a single tagged token.
    #[error("{file}:{line}: an address without tagged tokens")]
    NoTokens { file: String, line: u32 },
}

/// Reads a whole `AddressCollection`. `file` is only used in messages.
pub(crate) fn parse(file: &str, xml: &str) -> Result<Vec<Labelled>, XmlError> {
    let document = roxmltree::Document::parse(xml).map_err(|e| XmlError::Malformed {
        file: file.to_owned(),
        reason: e.to_string(),
    })?;
    let line_of = |node: roxmltree::Node<'_, '_>| document.text_pos_at(node.range().start).row;
    let expect = |node: roxmltree::Node<'_, '_>, expected: &'static str| {
        if node.has_tag_name(expected) {
            return Ok(());
        }
        Err(XmlError::Element {
            file: file.to_owned(),
            line: line_of(node),
            expected,
            found: node.tag_name().name().to_owned(),
        })
    };

    let root = document.root_element();
    expect(root, "AddressCollection")?;
    let mut addresses = Vec::new();
    for address in root.children().filter(roxmltree::Node::is_element) {
        expect(address, "AddressString")?;
        let line = line_of(address);
        let mut text = String::new();
        let mut tokens = Vec::new();
        for piece in address.children() {
            if piece.is_text() {
                text.push_str(piece.text().unwrap_or_default());
                continue;
            }
            if !piece.is_element() {
                continue; // a comment
            }
            let name = piece.tag_name().name();
            let Some(tag) = TAGS.iter().copied().find(|tag| *tag == name) else {
                return Err(XmlError::UnknownTag {
                    file: file.to_owned(),
                    line,
                    tag: name.to_owned(),
                });
            };
            if piece.children().any(|inner| inner.is_element()) {
                return Err(XmlError::Nested {
                    file: file.to_owned(),
                    line,
                    tag: name.to_owned(),
                });
            }
            // A comment splits a token's text into several nodes.
            let inner: String = piece
                .children()
                .filter_map(|inner| inner.text_if_text())
                .collect();
            text.push_str(&inner);
            let inner = collapse(&inner);
            if !inner.is_empty() {
                tokens.push(Token { tag, text: inner });
            }
        }
        if tokens.is_empty() {
            return Err(XmlError::NoTokens {
                file: file.to_owned(),
                line,
            });
        }
        addresses.push(Labelled {
            text: collapse(&text),
            tokens,
            line,
        });
    }
    Ok(addresses)
}

/// The text of a text node, nothing of a comment (`Node::text` answers for both).
trait TextIfText<'a> {
    fn text_if_text(&self) -> Option<&'a str>;
}

impl<'a> TextIfText<'a> for roxmltree::Node<'a, '_> {
    fn text_if_text(&self) -> Option<&'a str> {
        if self.is_text() { self.text() } else { None }
    }
}

/// Makes every run of white space one space and trims the ends.
fn collapse(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(inner: &str) -> Result<Labelled, XmlError> {
        let xml = format!(
            "<AddressCollection>\n  <AddressString>{inner}</AddressString>\n</AddressCollection>"
        );
        parse("t.xml", &xml).map(|mut all| all.remove(0))
    }

    fn tokens(address: &Labelled) -> Vec<(&str, &str)> {
        address
            .tokens
            .iter()
            .map(|t| (t.tag, t.text.as_str()))
            .collect()
    }

    #[test]
    fn separators_outside_the_tags_belong_to_the_text_only() {
        let got = one(
            "<StreetName>K</StreetName> <StreetNamePostType>Road</StreetNamePostType># \
             <OccupancyIdentifier>1</OccupancyIdentifier>, <PlaceName>Kenai</PlaceName>",
        )
        .unwrap();
        assert_eq!(got.text, "K Road# 1, Kenai");
        assert_eq!(
            tokens(&got),
            [
                ("StreetName", "K"),
                ("StreetNamePostType", "Road"),
                ("OccupancyIdentifier", "1"),
                ("PlaceName", "Kenai")
            ]
        );
        assert_eq!(got.line, 2);
    }

    #[test]
    fn entities_white_space_comments_and_empty_tags() {
        let got = one(
            "\n <Recipient>A&amp;B&#39;s </Recipient>\n\t<StreetName></StreetName><!-- x -->\
             <StreetName>M<!-- no -->ain </StreetName><StreetName> </StreetName> \
             <PlaceName><![CDATA[<Deale>]]>,</PlaceName>\n",
        )
        .unwrap();
        assert_eq!(got.text, "A&B's Main <Deale>,");
        assert_eq!(
            tokens(&got),
            [
                ("Recipient", "A&B's"),
                ("StreetName", "Main"),
                ("PlaceName", "<Deale>,")
            ]
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        assert_eq!(
            one("<Street>Main</Street>").unwrap_err().to_string(),
            "t.xml:2: unknown tag <Street>"
        );
        assert_eq!(
            one("<StreetName><b>Main</b></StreetName>")
                .unwrap_err()
                .to_string(),
            "t.xml:2: <StreetName> has elements inside; a token is plain text"
        );
        assert_eq!(
            one(" , ").unwrap_err().to_string(),
            "t.xml:2: an address without tagged tokens"
        );
        assert_eq!(
            parse("t.xml", "<a/>").unwrap_err().to_string(),
            "t.xml:1: expected <AddressCollection>, found <a>"
        );
        assert!(
            parse("t.xml", "<AddressCollection>")
                .unwrap_err()
                .to_string()
                .starts_with("t.xml: not well-formed: ")
        );
    }
}
