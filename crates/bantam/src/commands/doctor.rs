//! `bantam doctor`: is this machine fit, and is everything in its place?

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bantam_kernels::Isa;
use serde::Serialize;

use super::Context;
use crate::fetch::existing;
use crate::printer::{self, Table};
use crate::settings::DoctorSettings;

/// Room for a base model, a run and its checkpoints.
const DISK_WANTED: u64 = 3_000_000_000;
/// Training SmolLM2-135M and keeping the machine usable.
const MEMORY_WANTED: u64 = 3_000_000_000;

/// The `--json` object.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    os: &'static str,
    arch: &'static str,
    cpu: Option<String>,
    isa: &'static str,
    cpu_features: Vec<&'static str>,
    cores: usize,
    memory_bytes: Option<u64>,
    memory_available_bytes: Option<u64>,
    cache: PathBuf,
    cache_bytes: u64,
    disk_free_bytes: Option<u64>,
    python: Option<PathBuf>,
    python_version: Option<String>,
    pip: Option<String>,
    ok: bool,
    checks: Vec<Check>,
}

/// One line of the list.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    value: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

/// Looks and reports; a warning is no failure.
pub(crate) fn run(context: &Context, settings: &DoctorSettings) -> anyhow::Result<()> {
    let report = examine(context);
    if settings.json {
        return context.printer.json(&report);
    }
    let style = context.printer.out_style();
    context
        .printer
        .line(style.bold(&format!("bantam {}", report.version)))?;
    let mut table = Table::facts();
    for check in &report.checks {
        let mark = if check.ok { "✓" } else { "!" };
        table.row([format!("{mark} {}", check.name), check.value.clone()]);
    }
    for line in table.render(style).lines() {
        let painted = match line.chars().next() {
            Some('✓') => line.replacen('✓', &style.green("✓"), 1),
            Some('!') => line.replacen('!', &style.yellow("!"), 1),
            _ => line.to_owned(),
        };
        context.printer.line(painted)?;
    }
    for hint in report.checks.iter().filter_map(|c| c.hint.as_ref()) {
        context
            .printer
            .line(format!("{} {hint}", style.cyan("hint:")))?;
    }
    Ok(())
}

fn examine(context: &Context) -> Report {
    let cache = context.cache.root().to_owned();
    let python = context.global.network.python.clone();
    let memory = memory();
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        os: std::env::consts::OS,
        arch: std::env::consts::ARCH,
        cpu: cpu_name(),
        isa: Isa::detect().name(),
        cpu_features: cpu_features(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: memory.map(|m| m.0),
        memory_available_bytes: memory.map(|m| m.1),
        cache_bytes: context.cache.bytes(),
        disk_free_bytes: fs4::available_space(existing(&cache)).ok(),
        python_version: python.as_deref().and_then(|p| ask(p, &["--version"])),
        pip: python.as_deref().and_then(|p| {
            ask(
                p,
                &["-m", "pip", "--disable-pip-version-check", "--version"],
            )
        }),
        python,
        cache,
        ok: true,
        checks: Vec::new(),
    };
    report.checks = checks(&report, writable(&context.cache));
    report.ok = report.checks.iter().all(|c| c.ok);
    report
}

fn checks(report: &Report, writable: Result<(), String>) -> Vec<Check> {
    let good = |name, value: String| Check {
        name,
        ok: true,
        value,
        hint: None,
    };
    let judge = |name, ok: bool, value: String, hint: &str| Check {
        name,
        ok,
        value,
        hint: (!ok).then(|| hint.to_owned()),
    };
    let mut checks = vec![good("system", format!("{} {}", report.os, report.arch))];
    if let Some(cpu) = &report.cpu {
        checks.push(good("processor", cpu.clone()));
    }
    let features = if report.cpu_features.is_empty() {
        "none known"
    } else {
        &report.cpu_features.join(" ")
    };
    checks.push(judge(
        "instruction set",
        report.isa != "scalar",
        format!("{} (of {features})", report.isa),
        "without vector instructions everything works, but many times slower",
    ));
    checks.push(good("cores", report.cores.to_string()));
    if let (Some(total), Some(available)) = (report.memory_bytes, report.memory_available_bytes) {
        checks.push(judge(
            "memory",
            available >= MEMORY_WANTED,
            format!(
                "{} of {} available",
                printer::bytes(available),
                printer::bytes(total)
            ),
            "training a 135M model wants about 3 GB of memory: close what else is running",
        ));
    }
    let hint = "`bantam pull` of the first catalogue model needs Python 3 with pip: install `python3` and `python3-pip`";
    match (&report.python_version, &report.pip) {
        (Some(version), Some(pip)) => {
            checks.push(good("python", version.clone()));
            checks.push(good(
                "pip",
                pip.split(" from ").next().unwrap_or(pip).to_owned(),
            ));
        }
        (Some(version), None) => {
            checks.push(good("python", version.clone()));
            checks.push(judge("pip", false, "not found".into(), hint));
        }
        (None, _) => checks.push(judge("python", false, "not found".into(), hint)),
    }
    let (ok, value) = match writable {
        Ok(()) => (
            true,
            format!(
                "{} ({})",
                report.cache.display(),
                printer::bytes(report.cache_bytes)
            ),
        ),
        Err(error) => (false, error),
    };
    checks.push(judge(
        "cache",
        ok,
        value,
        "make the folder writable, or set BANTAM_HOME to one that is",
    ));
    if let Some(free) = report.disk_free_bytes {
        checks.push(judge(
            "disk",
            free >= DISK_WANTED,
            format!("{} free", printer::bytes(free)),
            "a model and a run with its checkpoints want about 3 GB: free some space",
        ));
    }
    checks
}

/// Whether the cache can be written, tried rather than guessed.
fn writable(cache: &crate::cache::Cache) -> Result<(), String> {
    cache
        .scratch()
        .map(drop)
        .map_err(|error| format!("{error:#}"))
}

/// What the processor offers beyond the baseline and matters to the arithmetic.
fn cpu_features() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! look {
            ($($name:tt),*) => { $(if std::arch::is_x86_feature_detected!($name) { found.push($name); })* };
        }
        look!(
            "avx2",
            "fma",
            "f16c",
            "avx512f",
            "avx512bw",
            "avx512vnni",
            "avx512bf16"
        );
    }
    #[cfg(target_arch = "aarch64")]
    {
        macro_rules! look {
            ($($name:tt),*) => { $(if std::arch::is_aarch64_feature_detected!($name) { found.push($name); })* };
        }
        look!("neon", "dotprod", "i8mm", "bf16", "fp16");
    }
    found
}

fn cpu_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Total and available memory in bytes, where the system tells.
fn memory() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find(|l| l.starts_with(name))?;
        line.split_whitespace()
            .nth(1)?
            .parse::<u64>()
            .ok()
            .map(|kib| kib * 1024)
    };
    Some((field("MemTotal:")?, field("MemAvailable:")?))
}

/// What a program says, if it runs and succeeds.
fn ask(program: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_poor_machine_gets_advice() {
        let report = Report {
            version: "0",
            os: "linux",
            arch: "x86_64",
            cpu: None,
            isa: "scalar",
            cpu_features: Vec::new(),
            cores: 1,
            memory_bytes: Some(2_000_000_000),
            memory_available_bytes: Some(1_000_000_000),
            cache: "/c".into(),
            cache_bytes: 0,
            disk_free_bytes: Some(1),
            python: None,
            python_version: None,
            pip: None,
            ok: false,
            checks: Vec::new(),
        };
        let checks = checks(&report, Err("read-only".into()));
        let lines: Vec<String> = checks
            .iter()
            .map(|c| {
                format!(
                    "{} {}: {} | {}",
                    if c.ok { "ok" } else { "!!" },
                    c.name,
                    c.value,
                    c.hint.as_deref().unwrap_or("")
                )
            })
            .collect();
        insta::assert_snapshot!(lines.join("\n"), @r#"
        ok system: linux x86_64 | 
        !! instruction set: scalar (of none known) | without vector instructions everything works, but many times slower
        ok cores: 1 | 
        !! memory: 1.0 GB of 2.0 GB available | training a 135M model wants about 3 GB of memory: close what else is running
        !! python: not found | `bantam pull` of the first catalogue model needs Python 3 with pip: install `python3` and `python3-pip`
        !! cache: read-only | make the folder writable, or set BANTAM_HOME to one that is
        !! disk: 1 B free | a model and a run with its checkpoints want about 3 GB: free some space
        "#);
    }
}
