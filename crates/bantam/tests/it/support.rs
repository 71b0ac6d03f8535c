//! What these tests share: a folder to run the binary in, and what the binary said.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

/// A folder to run the binary in: `home` is its cache, what lies in `bin` comes first on its path.
pub(crate) struct World {
    dir: tempfile::TempDir,
}

impl World {
    /// An empty one.
    pub(crate) fn empty() -> Self {
        let world = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        std::fs::create_dir(world.at("home")).unwrap();
        std::fs::create_dir(world.at("bin")).unwrap();
        world
    }

    /// A path in the folder.
    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    /// The binary, with nothing of the caller's environment.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bantam"));
        command
            .args(arguments)
            .current_dir(self.dir.path())
            .env_clear()
            .env("BANTAM_HOME", self.at("home"))
            .env(
                "PATH",
                format!("{}:/usr/bin:/bin", self.at("bin").display()),
            )
            .env("COLUMNS", "100")
            .stdin(Stdio::null());
        command
    }

    /// Runs it to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs it to its end with this on its stdin.
    pub(crate) fn run_with(&self, arguments: &[&str], stdin: &str) -> Output {
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A command that fails early does not read what it is given.
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        child.wait_with_output().unwrap()
    }

    /// The report of a command that must succeed.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        report(&self.run(arguments))
    }

    /// What a command says that must fail with 1.
    pub(crate) fn fails(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        self.anonymous(&said(&output))
    }

    /// Exit code, stdout and stderr as one text.
    pub(crate) fn transcript(&self, output: &Output) -> String {
        let (code, stdout) = (output.status.code().unwrap(), text(&output.stdout));
        self.anonymous(&format!("exit {code}\n{stdout}---\n{}", said(output)))
    }

    /// The text with this world's folder as `$DIR`.
    fn anonymous(&self, text: &str) -> String {
        text.replace(&self.dir.path().display().to_string(), "$DIR")
    }

    /// Puts a shell script in Python's place.
    pub(crate) fn python(&self, script: &str) {
        let path = self.at("bin/python3");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Puts a script in pip's place that counts its calls and serves a wheel of these files.
    pub(crate) fn pip(&self, package: &str, files: &[(String, Vec<u8>)]) {
        let mut wheel = zip::ZipWriter::new(std::fs::File::create(self.at("wheel")).unwrap());
        let options = zip::write::SimpleFileOptions::default();
        for (name, bytes) in files {
            wheel.start_file(name.as_str(), options).unwrap();
            wheel.write_all(bytes).unwrap();
        }
        wheel.finish().unwrap();
        // Finds the folder after `-d`, as pip would. The pause lets a second process come in between.
        self.python(&format!(
            "echo \"$@\" >> {calls}\nwhile [ \"$1\" != -d ]; do shift; done\n\
             sleep 0.3\ncp {wheel} \"$2/{package}-1.0-py3-none-any.whl\"",
            calls = self.at("calls").display(),
            wheel = self.at("wheel").display()
        ));
    }

    /// How often pip was called, and with which arguments.
    pub(crate) fn calls(&self) -> Vec<String> {
        let calls = std::fs::read_to_string(self.at("calls")).unwrap_or_default();
        calls.lines().map(str::to_owned).collect()
    }
}

/// The report of a command that must have succeeded: the last line of its stdout.
pub(crate) fn report(output: &Output) -> Value {
    let stdout = succeeded(output);
    serde_json::from_str(stdout.lines().last().unwrap()).unwrap()
}

/// Stdout of a command that must have succeeded.
pub(crate) fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{}", said(output));
    text(&output.stdout)
}

/// What the command said on stderr.
pub(crate) fn said(output: &Output) -> String {
    text(&output.stderr)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// SHA-256 as the catalogue writes it.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

/// Ends the server when a check fails before it is told to stop.
pub(crate) struct Guard(pub(crate) Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A running `bantam serve`.
pub(crate) struct Server {
    pub(crate) process: Guard,
    stderr: BufReader<std::process::ChildStderr>,
    pub(crate) address: String,
}

impl Server {
    /// Starts it on a free port, and waits until it serves.
    pub(crate) fn start(world: &World, arguments: &[&str]) -> Self {
        Self::start_with(world, arguments, &[])
    }

    /// The same, with more in its environment.
    pub(crate) fn start_with(world: &World, arguments: &[&str], env: &[(&str, &str)]) -> Self {
        let mut command = world.command(&[&["serve", "--port", "0"], arguments].concat());
        command.envs(env.iter().copied());
        let mut process = Guard(
            command
                .stderr(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
                .unwrap(),
        );
        let stderr = BufReader::new(process.0.stderr.take().unwrap());
        let mut server = Self {
            process,
            stderr,
            address: String::new(),
        };
        let line = server.line("http://");
        let rest = line.split("http://").nth(1).unwrap();
        server.address = rest.split('/').next().unwrap().to_string();
        server
    }

    /// The next line of what it says that has this in it.
    pub(crate) fn line(&mut self, with: &str) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.stderr.read_line(&mut line).unwrap(), 0, "no `{with}`");
            if line.contains(with) {
                return line;
            }
        }
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let process = rustix::process::Pid::from_child(&self.process.0);
        rustix::process::kill_process(process, signal).unwrap();
    }

    /// Ends it as Ctrl-C does.
    pub(crate) fn stop(mut self) {
        self.signal(rustix::process::Signal::INT);
        assert_eq!(
            self.process.0.wait().unwrap().code(),
            Some(0),
            "Ctrl-C is how a server ends"
        );
    }
}

/// Asks a server, and returns all that it answers.
pub(crate) fn request(address: &str, what: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(
        stream,
        "{what} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}
