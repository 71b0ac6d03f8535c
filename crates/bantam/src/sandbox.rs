//! Graders' programs, run where they reach nothing: a Python of its own for each row, without a network, without a file
//! to write, with a limit of time and memory, and with nothing to read but Python itself.
//!
//! The process is this program again, as `bantam sandbox`: it gives up its rights (capabilities, then files by Landlock,
//! then system calls by seccomp), and only then becomes Python. Where the kernel cannot promise all three, programs are
//! refused; there is no weaker mode.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bantam_serve::{Sandbox, SandboxError};
use serde_json::{Value, json};

/// The most bytes that are read of what a program says.
const WORDS: u64 = 16 << 10;

/// What Python runs: it reads the grader and the row from stdin, and writes the score to stdout. What the grader prints
/// goes to stderr.
const DRIVER: &str = "\
import json, math, sys
out, sys.stdout = sys.stdout, sys.stderr
given = json.load(sys.stdin)
space = {'__name__': 'grader'}
exec(compile(given['source'], 'grader.py', 'exec'), space)
score = space['grade'](given['sample'], given['item'])
if not isinstance(score, (int, float)) or not math.isfinite(score):
    raise TypeError('grade() must return a finite number, not ' + repr(score)[:200])
out.write(json.dumps({'score': float(score)}))
";

/// Runs programs, each in a process of its own.
pub(crate) struct PythonSandbox {
    program: PathBuf,
    limit: Duration,
    memory_mb: u64,
    /// Why there is no such place here, once that is known.
    refused: OnceLock<Option<String>>,
}

impl PythonSandbox {
    /// Programs get so much time, and so much memory.
    pub(crate) fn new(limit: Duration, memory_mb: u64) -> anyhow::Result<Self> {
        Ok(Self {
            program: std::env::current_exe().context("where is this program?")?,
            limit,
            memory_mb,
            refused: OnceLock::new(),
        })
    }

    fn run(&self, source: &str, sample: &Value, item: &Value) -> Result<f64, SandboxError> {
        let server = |error: std::io::Error| SandboxError::Server(error.to_string());
        let mut child = Command::new(&self.program)
            .args([
                "sandbox",
                "--seconds",
                &self.limit.as_secs().max(1).to_string(),
            ])
            .args(["--memory-mb", &self.memory_mb.to_string()])
            .env_clear()
            // Python is looked for where the server would find it.
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(server)?;
        let given = json!({"source": source, "sample": sample, "item": item}).to_string();
        let (Some(mut stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(SandboxError::Server("the program has no pipes".to_string()));
        };
        // Each pipe has a thread: a program that does not read, or says too much, holds up nobody.
        let said = std::thread::scope(|scope| {
            scope.spawn(move || drop(stdin.write_all(given.as_bytes())));
            let out = scope.spawn(move || read(stdout));
            let err = scope.spawn(move || read(stderr));
            let status = wait(&mut child, self.limit);
            let out = out.join().unwrap_or_default();
            let err = err.join().unwrap_or_default();
            (status, out, err)
        });
        let (status, out, err) = said;
        let Some(status) = status.map_err(server)? else {
            let seconds = self.limit.as_secs_f64();
            return Err(SandboxError::Program(format!(
                "the program took more than {seconds} s"
            )));
        };
        if let Some(why) = err.strip_prefix(REFUSED) {
            return Err(SandboxError::Server(why.trim().to_string()));
        }
        let score = serde_json::from_str::<Value>(&out);
        match score.ok().and_then(|score| score["score"].as_f64()) {
            Some(score) if status.success() => Ok(score),
            _ => Err(SandboxError::Program(last_words(&err, &status))),
        }
    }
}

/// The last line of what Python said is what was raised.
fn last_words(err: &str, status: &std::process::ExitStatus) -> String {
    let line = err.trim().lines().next_back().unwrap_or_default();
    let line: String = line.chars().take(500).collect();
    if line.is_empty() {
        format!("the program ended without a score ({status})")
    } else {
        line
    }
}

/// Up to so many of the last bytes; the rest is read, too, so that the program does not wait for it.
fn read(mut pipe: impl Read) -> String {
    let mut kept = Vec::new();
    let mut piece = [0; 4096];
    while let Ok(n @ 1..) = pipe.read(&mut piece) {
        kept.extend_from_slice(&piece[..n]);
        let extra = kept.len().saturating_sub(WORDS as usize);
        // The beginning says whether the place was refused, and that is short.
        if extra > 0 && kept.len() > 2 * WORDS as usize {
            kept.drain(..extra);
        }
    }
    String::from_utf8_lossy(&kept).into_owned()
}

/// Waits for the end; `None` if it had to be killed.
fn wait(child: &mut Child, limit: Duration) -> std::io::Result<Option<std::process::ExitStatus>> {
    let began = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if began.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

impl Sandbox for PythonSandbox {
    fn refusal(&self) -> Option<String> {
        let probe = || {
            let tried = self.run("def grade(sample, item): return 1", &json!({}), &json!({}));
            match tried {
                Ok(_) => None,
                Err(SandboxError::Server(why) | SandboxError::Program(why)) => Some(format!(
                    "this machine has no place to run programs in: {why}"
                )),
            }
        };
        self.refused.get_or_init(probe).clone()
    }

    fn grade(&self, source: &str, sample: &Value, item: &Value) -> Result<f64, SandboxError> {
        match self.refusal() {
            Some(why) => Err(SandboxError::Server(why)),
            None => self.run(source, sample, item),
        }
    }
}

/// What the process says first if it cannot give up its rights.
const REFUSED: &str = "bantam sandbox: ";

/// In the program's process: gives up every right, then becomes Python. Returns only if that failed, and then nothing
/// was run.
pub(crate) fn enter(seconds: u64, memory_mb: u64) -> String {
    let why = match python() {
        Some((python, root)) => confine(seconds, memory_mb, &root)
            .and_then(|()| become_python(&python))
            .map_or_else(|error| format!("{error:#}"), |()| String::new()),
        None => "there is no `python3` in the PATH".to_string(),
    };
    format!("{REFUSED}{why}")
}

/// Python, and the folder that holds its library.
fn python() -> Option<(PathBuf, PathBuf)> {
    let path = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&path).map(|folder| folder.join("python3"));
    let python = found
        .filter_map(|path| path.canonicalize().ok())
        .find(|path| path.is_file())?;
    // A Python in a virtual environment is a link to the one it was made from.
    let root = python.parent()?.parent()?.to_path_buf();
    Some((python, root))
}

#[cfg(unix)]
fn become_python(python: &Path) -> anyhow::Result<()> {
    use std::os::unix::process::CommandExt as _;
    // Isolated: no variables of the environment, no folder of the user's.
    let error = Command::new(python)
        .args(["-I", "-B", "-c", DRIVER])
        .env_clear()
        .exec();
    Err(error).context("python could not be started")
}

#[cfg(not(unix))]
fn become_python(_python: &Path) -> anyhow::Result<()> {
    anyhow::bail!("there is no sandbox for this system")
}

#[cfg(not(target_os = "linux"))]
fn confine(_seconds: u64, _memory_mb: u64, _root: &Path) -> anyhow::Result<()> {
    anyhow::bail!("Landlock and seccomp are Linux's")
}

#[cfg(target_os = "linux")]
fn confine(seconds: u64, memory_mb: u64, root: &Path) -> anyhow::Result<()> {
    linux::limits(seconds, memory_mb)?;
    linux::capabilities()?;
    linux::files(root)?;
    linux::calls()
}

#[cfg(target_os = "linux")]
mod linux {
    use std::collections::BTreeMap;
    use std::path::Path;

    use anyhow::Context as _;
    use landlock::{
        ABI, Access as _, AccessFs, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _,
        RulesetCreatedAttr as _, RulesetStatus, path_beneath_rules,
    };
    use rustix::process::{Resource, Rlimit, setrlimit};
    use rustix::thread::{
        CapabilitySet, CapabilitySets, clear_ambient_capability_set, set_capabilities,
    };
    use seccompiler::{
        BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
        SeccompRule, apply_filter,
    };

    /// Where shared libraries are, and what the loader reads.
    const READABLE: [&str; 8] = [
        "/usr/lib",
        "/usr/lib64",
        "/usr/local/lib",
        "/lib",
        "/lib64",
        "/etc/ld.so.cache",
        "/dev/urandom",
        "/nix/store",
    ];

    pub(super) fn limits(seconds: u64, memory_mb: u64) -> anyhow::Result<()> {
        let to = |resource, most: u64| {
            let limit = Rlimit {
                current: Some(most),
                maximum: Some(most),
            };
            setrlimit(resource, limit).context("could not set a limit")
        };
        to(Resource::As, memory_mb << 20)?;
        to(Resource::Cpu, seconds)?;
        to(Resource::Fsize, 0)?;
        to(Resource::Core, 0)?;
        to(Resource::Nofile, 64)
    }

    pub(super) fn capabilities() -> anyhow::Result<()> {
        let none = CapabilitySet::empty();
        let sets = CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        };
        // A kernel that knows no ambient capabilities has none to clear.
        let _ = clear_ambient_capability_set();
        set_capabilities(None, sets).context("could not give up capabilities")
    }

    /// Nothing can be written; nothing can be read but Python, its libraries, and random numbers.
    pub(super) fn files(root: &Path) -> anyhow::Result<()> {
        let abi = ABI::V3;
        let read = AccessFs::from_read(abi);
        let mut readable: Vec<&Path> = READABLE.iter().map(Path::new).collect();
        // Python's own folder; if that is the root of the system, its parts that matter are in the list.
        let library = root.join("lib");
        let programs = root.join("bin");
        readable.extend([library.as_path(), programs.as_path()]);
        let status = Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(ABI::V1))
            .context("this kernel has no Landlock")?
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(abi))?
            .create()?
            .add_rules(path_beneath_rules(readable, read))?
            .restrict_self()
            .context("Landlock could not be turned on")?;
        anyhow::ensure!(
            status.ruleset != RulesetStatus::NotEnforced && status.no_new_privs,
            "this kernel does not enforce Landlock"
        );
        Ok(())
    }

    /// No network, no other process, nothing of the system's.
    pub(super) fn calls() -> anyhow::Result<()> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for call in FORBIDDEN {
            rules.insert(*call, Vec::new());
        }
        // A thread is no process. The kernel is told that there is no `clone3`, whose flags a filter cannot see; libc
        // then asks for `clone`.
        let is_thread = |value: u64| {
            let flag = libc::CLONE_THREAD as u64;
            let masked = SeccompCmpOp::MaskedEq(flag);
            SeccompCondition::new(0, SeccompCmpArgLen::Qword, masked, value)
        };
        rules.insert(
            libc::SYS_clone,
            vec![SeccompRule::new(vec![is_thread(0)?])?],
        );
        // Limits may be read.
        let is_set = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Ne, 0)?;
        rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(vec![is_set])?]);
        apply(rules, libc::EPERM)?;
        apply(
            BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
            libc::ENOSYS,
        )
    }

    fn apply(rules: BTreeMap<i64, Vec<SeccompRule>>, error: i32) -> anyhow::Result<()> {
        let filter = SeccompFilter::new(
            rules,
            SeccompAction::Allow,
            SeccompAction::Errno(error.unsigned_abs()),
            std::env::consts::ARCH.try_into()?,
        )?;
        let program: BpfProgram = filter.try_into()?;
        apply_filter(&program).context("this kernel has no seccomp filters")
    }

    const FORBIDDEN: &[i64] = &[
        // The network, and every other socket.
        libc::SYS_socket,
        libc::SYS_socketpair,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_listen,
        libc::SYS_accept,
        libc::SYS_accept4,
        libc::SYS_sendto,
        libc::SYS_sendmsg,
        libc::SYS_sendmmsg,
        // Calls that a filter does not see.
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        // Other processes.
        #[cfg(target_arch = "x86_64")]
        libc::SYS_fork,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_vfork,
        libc::SYS_kill,
        libc::SYS_tkill,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_getfd,
        libc::SYS_pidfd_send_signal,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_setpriority,
        libc::SYS_sched_setscheduler,
        libc::SYS_sched_setattr,
        libc::SYS_sched_setparam,
        libc::SYS_setrlimit,
        // Namespaces, mounts, keys, the kernel.
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_move_mount,
        libc::SYS_open_tree,
        libc::SYS_fsopen,
        libc::SYS_fspick,
        libc::SYS_fsmount,
        libc::SYS_open_by_handle_at,
        libc::SYS_name_to_handle_at,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_keyctl,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_shmget,
        libc::SYS_msgget,
        libc::SYS_semget,
        libc::SYS_mq_open,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_kexec_load,
        libc::SYS_reboot,
        libc::SYS_swapon,
        libc::SYS_swapoff,
        libc::SYS_acct,
        libc::SYS_settimeofday,
        libc::SYS_clock_settime,
        libc::SYS_clock_adjtime,
        libc::SYS_adjtimex,
        libc::SYS_sethostname,
        libc::SYS_setdomainname,
        libc::SYS_syslog,
        libc::SYS_fanotify_init,
    ];
}
