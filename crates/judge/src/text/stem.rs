//! Porter's stemmer, with nltk's departures from the paper.
//!
//! Source: Porter 1980, "An algorithm for suffix stripping", Program 14(3); the departures are those of nltk's default
//! mode: a dozen irregular words, `-ies` and `-ied` of four letters keep their `e`, `y` becomes `i` after a consonant,
//! and a stem of a vowel and a consonant takes an `e` back.

/// Words whose stems no rule gives.
const IRREGULAR: [(&str, &str); 16] = [
    ("sky", "sky"),
    ("skies", "sky"),
    ("dying", "die"),
    ("lying", "lie"),
    ("tying", "tie"),
    ("news", "news"),
    ("innings", "inning"),
    ("inning", "inning"),
    ("outings", "outing"),
    ("outing", "outing"),
    ("cannings", "canning"),
    ("canning", "canning"),
    ("howe", "howe"),
    ("proceed", "proceed"),
    ("exceed", "exceed"),
    ("succeed", "succeed"),
];

/// Suffixes that step 2 shortens where the measure before them is positive.
const STEP_2: [(&str, &str); 21] = [
    ("ational", "ate"),
    ("tional", "tion"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("izer", "ize"),
    ("bli", "ble"),
    ("alli", "al"),
    ("entli", "ent"),
    ("eli", "e"),
    ("ousli", "ous"),
    ("ization", "ize"),
    ("ation", "ate"),
    ("ator", "ate"),
    ("alism", "al"),
    ("iveness", "ive"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("aliti", "al"),
    ("iviti", "ive"),
    ("biliti", "ble"),
    ("fulli", "ful"),
];

const STEP_3: [(&str, &str); 7] = [
    ("icate", "ic"),
    ("ative", ""),
    ("alize", "al"),
    ("iciti", "ic"),
    ("ical", "ic"),
    ("ful", ""),
    ("ness", ""),
];

const STEP_4: [&str; 19] = [
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou",
    "ism", "ate", "iti", "ous", "ive", "ize",
];

/// The stem of a lowercase word.
pub fn stem(word: &str) -> String {
    if let Some((_, stem)) = IRREGULAR.iter().find(|(form, _)| *form == word) {
        return (*stem).to_string();
    }
    let word: Vec<char> = word.chars().collect();
    if word.len() <= 2 {
        return word.into_iter().collect();
    }
    let word = step_1c(step_1b(step_1a(word)));
    let word = step_5(step_4(step_3(step_2(word))));
    word.into_iter().collect()
}

fn ends(word: &[char], suffix: &str) -> bool {
    let n = suffix.len();
    word.len() >= n && word[word.len() - n..].iter().copied().eq(suffix.chars())
}

/// The word with its last `n` letters replaced.
fn with(word: &[char], n: usize, suffix: &str) -> Vec<char> {
    let kept = word[..word.len() - n].iter().copied();
    kept.chain(suffix.chars()).collect()
}

/// Which letters are consonants: all but a, e, i, o, u and a `y` after a consonant.
fn consonants(word: &[char]) -> Vec<bool> {
    let mut flags: Vec<bool> = Vec::with_capacity(word.len());
    for c in word {
        let flag = match c {
            'a' | 'e' | 'i' | 'o' | 'u' => false,
            'y' => !flags.last().copied().unwrap_or(false),
            _ => true,
        };
        flags.push(flag);
    }
    flags
}

/// How often a vowel is followed by a consonant: Porter's m.
fn measure(word: &[char]) -> usize {
    let flags = consonants(word);
    flags.windows(2).filter(|two| !two[0] && two[1]).count()
}

fn has_vowel(word: &[char]) -> bool {
    consonants(word).contains(&false)
}

/// Porter's *o: consonant, vowel, consonant other than w, x, y; or a whole word of vowel and consonant.
fn ends_short(word: &[char]) -> bool {
    let flags = consonants(word);
    match flags.as_slice() {
        [.., true, false, true] => !matches!(word.last(), Some('w' | 'x' | 'y')),
        [false, true] => true,
        _ => false,
    }
}

fn step_1a(word: Vec<char>) -> Vec<char> {
    if ends(&word, "ies") {
        let keeps_e = word.len() == 4;
        return with(&word, 3, if keeps_e { "ie" } else { "i" });
    }
    if ends(&word, "sses") {
        return with(&word, 2, "");
    }
    if ends(&word, "ss") || !ends(&word, "s") {
        return word;
    }
    with(&word, 1, "")
}

fn step_1b(word: Vec<char>) -> Vec<char> {
    if ends(&word, "ied") {
        let keeps_e = word.len() == 4;
        return with(&word, 3, if keeps_e { "ie" } else { "i" });
    }
    if ends(&word, "eed") {
        let is_long = measure(&word[..word.len() - 3]) > 0;
        return if is_long { with(&word, 1, "") } else { word };
    }
    let cut = [("ed", 2), ("ing", 3)]
        .into_iter()
        .find(|(suffix, n)| ends(&word, suffix) && has_vowel(&word[..word.len() - n]));
    let Some((_, n)) = cut else { return word };
    let stem = with(&word, n, "");
    if ["at", "bl", "iz"].iter().any(|suffix| ends(&stem, suffix)) {
        return with(&stem, 0, "e");
    }
    if let [.., a, b] = stem.as_slice()
        && a == b
        && consonants(&stem).last() == Some(&true)
    {
        let stays = matches!(b, 'l' | 's' | 'z');
        return if stays { stem } else { with(&stem, 1, "") };
    }
    if measure(&stem) == 1 && ends_short(&stem) {
        return with(&stem, 0, "e");
    }
    stem
}

fn step_1c(word: Vec<char>) -> Vec<char> {
    let n = word.len();
    if ends(&word, "y") && n > 2 && consonants(&word)[n - 2] {
        return with(&word, 1, "i");
    }
    word
}

fn step_2(word: Vec<char>) -> Vec<char> {
    let is_long = |word: &[char], n: usize| measure(&word[..word.len() - n]) > 0;
    if ends(&word, "alli") && is_long(&word, 4) {
        // Once more: what is left may end in `-ational` or `-tional`.
        return step_2(with(&word, 2, ""));
    }
    if let Some((suffix, new)) = STEP_2.iter().find(|(suffix, _)| ends(&word, suffix)) {
        let changes = is_long(&word, suffix.len());
        return if changes {
            with(&word, suffix.len(), new)
        } else {
            word
        };
    }
    if ends(&word, "logi") && is_long(&word, 3) {
        return with(&word, 1, "");
    }
    word
}

fn step_3(word: Vec<char>) -> Vec<char> {
    match STEP_3.iter().find(|(suffix, _)| ends(&word, suffix)) {
        Some((suffix, new)) if measure(&word[..word.len() - suffix.len()]) > 0 => {
            with(&word, suffix.len(), new)
        }
        _ => word,
    }
}

fn step_4(word: Vec<char>) -> Vec<char> {
    let Some(suffix) = STEP_4.iter().find(|suffix| ends(&word, suffix)) else {
        return word;
    };
    let stem = &word[..word.len() - suffix.len()];
    let fits = *suffix != "ion" || matches!(stem.last(), Some('s' | 't'));
    if measure(stem) > 1 && fits {
        stem.to_vec()
    } else {
        word
    }
}

fn step_5(mut word: Vec<char>) -> Vec<char> {
    if ends(&word, "e") {
        let stem = &word[..word.len() - 1];
        let m = measure(stem);
        if m > 1 || m == 1 && !ends_short(stem) {
            word.pop();
        }
    }
    if ends(&word, "ll") && measure(&word[..word.len() - 1]) > 1 {
        word.pop();
    }
    word
}

#[cfg(test)]
mod tests {
    use super::stem;

    #[test]
    fn the_examples_of_the_paper() {
        for (word, want) in [
            ("caresses", "caress"),
            ("ponies", "poni"),
            ("ties", "tie"),
            ("cats", "cat"),
            ("agreed", "agre"),
            ("plastered", "plaster"),
            ("sing", "sing"),
            ("conflated", "conflat"),
            ("hopping", "hop"),
            ("filing", "file"),
            ("happy", "happi"),
            ("enjoy", "enjoy"),
            ("relational", "relat"),
            ("vietnamization", "vietnam"),
            ("electricity", "electr"),
            ("adoption", "adopt"),
            ("probate", "probat"),
            ("controll", "control"),
            ("skies", "sky"),
            ("owing", "owe"),
            ("geology", "geolog"),
        ] {
            assert_eq!(stem(word), want, "{word}");
        }
    }
}
