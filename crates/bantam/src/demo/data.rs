//! The demo's data: fetched, converted, split, checked for leaks and written down as chat rows.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::answer::harmonise;
use super::contest::{TestRows, TestSets};
use super::rows;
use super::split::{LeakCheck, leak_check, split};
use super::xml::{self, Labelled};
use crate::fetch::{Fetcher, sdist};

/// The package whose source distribution carries the labelled addresses.
const PACKAGE: &str = "usaddress";
const VERSION: &str = "0.5.16";
/// Digest of `usaddress-0.5.16.tar.gz`.
const SHA256: &str = "f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6";
/// The licence the package states.
const LICENCE: &str = "MIT";
/// The two corpora in the archive.
const LABELLED: &str = "usaddress-0.5.16/training/labeled.xml";
const MESSIEST: &str = "usaddress-0.5.16/training/us50_messiest_manual_label.xml";

/// The rows of every side, on disk and in memory.
#[derive(Debug)]
pub(crate) struct DemoData {
    pub(crate) train: Vec<Labelled>,
    pub(crate) train_file: PathBuf,
    pub(crate) valid_file: PathBuf,
    pub(crate) sets: TestSets,
    pub(crate) summary: super::scorecard::Data,
}

/// Fetches the archive and makes the rows of it, in `folder`.
pub(crate) fn prepare(
    fetcher: &Fetcher<'_>,
    folder: &Path,
    limit: usize,
) -> anyhow::Result<DemoData> {
    let archive = fetcher.pypi_sdist(PACKAGE, VERSION, SHA256)?;
    let files = sdist::read_members(&archive, &[LABELLED, MESSIEST])?;
    let parse = |name: &str, bytes: &[u8]| -> anyhow::Result<Vec<Labelled>> {
        let text = std::str::from_utf8(bytes).with_context(|| format!("`{name}` is not UTF-8"))?;
        Ok(xml::parse(name, text)?)
    };
    let labelled = parse(LABELLED, &files[0])?;
    let messiest = parse(MESSIEST, &files[1])?;
    convert(labelled, messiest, folder, limit)
}

/// Splits the rows, refuses a leak, and writes a file for each side.
fn convert(
    labelled: Vec<Labelled>,
    messiest: Vec<Labelled>,
    folder: &Path,
    limit: usize,
) -> anyhow::Result<DemoData> {
    let mut split = split(labelled, messiest);
    let leaks = leak_check(&split);
    anyhow::ensure!(
        leaks.is_clean(),
        "an address is on two sides of the split: {leaks:?}"
    );

    let file = |name: &str| folder.join(name);
    let (train_file, valid_file) = (file("train.jsonl"), file("valid.jsonl"));
    rows::write(&train_file, &split.train)?;
    rows::write(&valid_file, &split.valid)?;
    rows::write(&file("test.jsonl"), &split.test)?;
    rows::write(&file("messiest.jsonl"), &split.messiest)?;

    let mut summary = summary(&split, leaks);
    split.test.truncate(limit);
    split.messiest.truncate(limit);
    let mut relabelled = split.messiest.clone();
    summary.relabelled = relabelled
        .iter_mut()
        .map(|row| harmonise(&mut row.tokens))
        .filter(|changed| *changed)
        .count();
    let relabelled_file = file("messiest_relabelled.jsonl");
    rows::write(&relabelled_file, &relabelled)?;
    Ok(DemoData {
        train: split.train,
        sets: TestSets {
            test: TestRows::new("test", "held-out test", split.test, &file("test.jsonl"))?,
            messiest: TestRows::new(
                "messiest",
                "messiest",
                split.messiest,
                &file("messiest.jsonl"),
            )?,
            relabelled: TestRows::new(
                "messiest_relabelled",
                "messiest, relabelled",
                relabelled,
                &relabelled_file,
            )?,
        },
        train_file,
        valid_file,
        summary,
    })
}

fn summary(split: &super::split::Split, leak_check: LeakCheck) -> super::scorecard::Data {
    super::scorecard::Data {
        package: format!("{PACKAGE}=={VERSION}"),
        sha256: SHA256.to_owned(),
        licence: LICENCE.to_owned(),
        train: split.train.len(),
        valid: split.valid.len(),
        test: split.test.len(),
        messiest: split.messiest.len(),
        relabelled: 0,
        leak_check,
    }
}

/// The leak check in words, a line a finding.
pub(crate) fn leak_lines(data: &super::scorecard::Data) -> Vec<String> {
    let leaks = &data.leak_check;
    vec![
        format!(
            "leak check  texts on two sides: test/train {}, test/valid {}, valid/train {}, \
             messiest/train {}, messiest/valid {}, messiest/test {}",
            leaks.test_in_train,
            leaks.test_in_valid,
            leaks.valid_in_train,
            leaks.messiest_in_train,
            leaks.messiest_in_valid,
            leaks.messiest_in_test
        ),
        format!(
            "            {} rows dropped because the messiest set has them, {} as repeats; repeats left: \
             test {}, messiest {}",
            leaks.set_aside,
            leaks.repeats_dropped,
            leaks.repeats_in_test,
            leaks.repeats_in_messiest
        ),
        format!(
            "            like a training row but for its digits: test {}, messiest {}",
            leaks.test_like_train_but_for_digits, leaks.messiest_like_train_but_for_digits
        ),
    ]
}
