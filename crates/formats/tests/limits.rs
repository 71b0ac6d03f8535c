//! What happens when the system says no: a disk that is full, memory that is short.
//!
//! The limits are set by a shell around a second run of this test binary, so that they hold for that process alone
//! and need no rights.

#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use bantam_formats::{
    DType, FormatError, Gguf, GgufWriter, Metadata, SafetensorsFile, TensorSpec, atomic,
};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Runs an ignored test of this file under a shell's `ulimit`.
fn run_under(limit: &str, test: &str) {
    let output = Command::new("sh")
        // A write over the size limit is to be an error and not a signal.
        .args([
            "-c",
            &format!("trap '' XFSZ; {limit} && exec \"$0\" --ignored --exact {test}"),
        ])
        .arg(std::env::current_exe().unwrap())
        .output()
        .unwrap();
    let talk = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && talk.contains("1 passed"),
        "{talk}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_full_disk_leaves_the_previous_file_whole() {
    // Blocks of 512 or 1,024 bytes, as the shell likes: the file may have 64 or 128 kB.
    run_under("ulimit -f 128", "writes_beyond_the_size_limit");
}

#[test]
#[ignore = "run by `a_full_disk_leaves_the_previous_file_whole`, under its limit"]
fn writes_beyond_the_size_limit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let alone = |folder: &Path| fs::read_dir(folder).unwrap().count() == 1;

    atomic::write(&path, b"the previous file").unwrap();
    let error = atomic::write(&path, &[1; 1 << 20]).unwrap_err();
    assert!(matches!(error, FormatError::DiskFull { .. }), "{error:?}");
    assert!(
        error.to_string().contains("no space left to write"),
        "{error}"
    );
    assert_eq!(fs::read(&path).unwrap(), b"the previous file");
    assert!(alone(folder.path()), "a temporary file was left behind");

    let specs: Vec<TensorSpec> = (0..64)
        .map(|i| TensorSpec::new(format!("t{i}"), DType::F32, [4096]))
        .collect();
    let mut writer = GgufWriter::create(&path, &Metadata::new(), &specs).unwrap();
    let error = specs
        .iter()
        .find_map(|spec| writer.tensor(&spec.name, &[1; 4096 * 4]).err())
        .unwrap();
    assert!(matches!(error, FormatError::DiskFull { .. }), "{error:?}");
    drop(writer);
    assert_eq!(fs::read(&path).unwrap(), b"the previous file");
    assert!(alone(folder.path()), "a temporary file was left behind");
}

/// A file of 200 kB cannot make a reader take 400 MB.
#[test]
#[cfg(target_os = "linux")]
fn stated_lengths_take_no_memory() {
    run_under(
        "ulimit -v 400000",
        "reads_files_that_state_more_than_they_have",
    );
}

#[test]
#[ignore = "run by `stated_lengths_take_no_memory`, under its limit"]
fn reads_files_that_state_more_than_they_have() {
    let tail = vec![0; 200_000];
    for length in [
        1 << 17,
        1 << 20,
        1 << 23,
        (1 << 23) + 1,
        1 << 32,
        1 << 40,
        1 << 60,
        u64::MAX / 8,
        u64::MAX,
    ] {
        // The tail is zeros: bytes and flat arrays that fit it are sound.
        let fits = length <= tail.len() as u64;
        let length = u64::to_le_bytes(length);
        let one = 1u64.to_le_bytes();
        let zero = 0u64.to_le_bytes();
        let head: &[u8] = b"GGUF\x03\0\0\0";
        // Tensors, pairs, a key, a string, and arrays of every type.
        let mut files = vec![
            [head, &length, &zero, &tail].concat(),
            [head, &zero, &length, &tail].concat(),
            [head, &zero, &one, &length, &tail].concat(),
            [head, &zero, &one, &one, b"k\x08\0\0\0", &length, &tail].concat(),
        ];
        for code in 0..13 {
            let array = [9, 0, 0, 0, code, 0, 0, 0];
            files.push([head, &zero, &one, &one, b"k", &array, &length, &tail].concat());
        }
        for file in files {
            assert!(Gguf::from_bytes(file).is_err() || fits);
        }
        assert!(SafetensorsFile::from_bytes([&length[..], b"{}", &tail].concat()).is_err());
    }
}
