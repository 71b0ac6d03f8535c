//! The words of machine translation's metrics.

/// A text cut into words as `mteval-v13a` cuts it: punctuation stands alone, but for a period or comma between digits.
///
/// Source: NIST's mteval-v13a.pl, in the form that sacrebleu calls `13a`
pub fn words_13a(text: &str) -> Vec<String> {
    let text = text
        .trim_end()
        .replace("<skipped>", "")
        .replace("-\n", "")
        .replace('\n', " ")
        .replace("&quot;", "\"")
        .replace("&amp;", "&")
        .replace("&lt;", "<")
        .replace("&gt;", ">");
    let mut chars: Vec<char> = Vec::with_capacity(text.len() + 16);
    chars.push(' ');
    // Every sign but a period, a comma and a hyphen stands alone.
    for c in text.chars() {
        let is_sign = matches!(c, '{'..='~' | '['..='`' | ' '..='&' | '('..='+' | ':'..='@' | '/');
        if is_sign {
            chars.extend([' ', c, ' ']);
        } else {
            chars.push(c);
        }
    }
    chars.push(' ');
    // Each pass reads what the one before wrote, two characters at a time, and a pair that it changed is done with.
    let is_point = |c: char| c == '.' || c == ',';
    let chars = pairs(&chars, |a, b| {
        (!a.is_ascii_digit() && is_point(b)).then_some([a, ' ', b, ' '])
    });
    let chars = pairs(&chars, |a, b| {
        (is_point(a) && !b.is_ascii_digit()).then_some([' ', a, ' ', b])
    });
    let chars = pairs(&chars, |a, b| {
        (a.is_ascii_digit() && b == '-').then_some([a, ' ', b, ' '])
    });
    let text: String = chars.into_iter().collect();
    text.split_whitespace().map(str::to_string).collect()
}

fn pairs(chars: &[char], change: impl Fn(char, char) -> Option<[char; 4]>) -> Vec<char> {
    let mut out = Vec::with_capacity(chars.len() + 16);
    let mut at = 0;
    while at < chars.len() {
        let pair = chars.get(at + 1).and_then(|b| change(chars[at], *b));
        match pair {
            Some(four) => {
                out.extend(four);
                at += 2;
            }
            None => {
                out.push(chars[at]);
                at += 1;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_stand_alone_and_numbers_hold_together() {
        let cut = |text| words_13a(text).join("|");
        assert_eq!(
            cut("It's 3.5% (or 1,000), no-one."),
            "It's|3.5|%|(|or|1,000|)|,|no-one|."
        );
        assert_eq!(cut("&quot;a&quot; 1-2 \n x..."), "\"|a|\"|1|-|2|x|.|.|.");
        assert_eq!(cut("  "), "");
    }
}
