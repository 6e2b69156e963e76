use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

pub fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

/// The start of `bench`'s warning that other processes use the CPU.
pub const BUSY: &str = "warning: other processes use ";

/// The result of a run of the program.
pub struct Run {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    /// Without the warning about a busy machine, which other tests cause.
    pub fn of(output: Output) -> Self {
        let stderr = String::from_utf8(output.stderr).expect("only UTF-8 is printed");
        let kept = stderr.split_inclusive('\n').filter(|line| !line.starts_with(BUSY));
        Run {
            status: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).expect("only UTF-8 is printed"),
            stderr: kept.collect(),
        }
    }

    /// Panics unless the run succeeded without output on stderr.
    pub fn ok(self) -> Self {
        assert_eq!((self.status, self.stderr.as_str()), (0, ""), "{}", self.stdout);
        self
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {}", self.stdout))
    }

    /// Panics unless the run was refused with exit status 2 and one message; returns the message and the help.
    pub fn refused(self) -> (String, String) {
        assert_eq!(self.status, 2, "{}{}", self.stdout, self.stderr);
        assert_eq!(self.stdout, "");
        let text = self
            .stderr
            .strip_prefix("error: ")
            .unwrap_or_else(|| panic!("{}", self.stderr));
        assert_eq!(text.matches("\nerror: ").count(), 0, "one message: {text}");
        match text.trim_end().split_once("\nhelp: ") {
            Some((message, help)) => (message.to_string(), help.to_string()),
            None => (text.trim_end().to_string(), String::new()),
        }
    }
}

pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lapidary"));
    // Tests must not depend on the machine's TensorRT or terminal.
    command.env_remove("TENSORRT_RTX_LIB").env("COLUMNS", "100");
    command
}

pub fn lapidary<I, S>(args: I) -> Run
where
    I: IntoIterator<Item = S>,
    S: AsRef<std::ffi::OsStr>,
{
    Run::of(command().args(args).output().expect("the program starts"))
}

/// Converts a fixture into `folder/pkg`.
pub fn package(folder: &Path, model: &Path, flags: &[&str]) -> PathBuf {
    let pkg = folder.join("pkg");
    let mut args = vec![
        "convert".into(),
        model.as_os_str().to_owned(),
        "-o".into(),
        pkg.clone().into(),
    ];
    args.extend(flags.iter().map(|f| f.into()));
    lapidary(args).ok();
    pkg
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// `1,2,3`
pub fn ids(value: &Value) -> String {
    let ids: Vec<String> = value.as_array().unwrap().iter().map(Value::to_string).collect();
    ids.join(",")
}

/// Names of a folder's entries, including hidden files.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
