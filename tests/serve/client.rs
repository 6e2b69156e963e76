//! A server process of the binary, and a minimal HTTP client.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::models::talker;
use crate::support::{command, text};

/// A running server; killed when a test is done with it.
pub struct Server {
    /// `None`: it runs in the test process.
    child: Option<Child>,
    address: String,
    folder: tempfile::TempDir,
}

/// A response.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The document of a successful response.
    pub fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    /// Status, code and message of an error in OpenAI's shape.
    pub fn error(&self) -> (u16, Value, String) {
        let document = self.json();
        let error = &document["error"];
        assert!(error["type"].is_string(), "{document}");
        let message = error["message"].as_str().unwrap_or_else(|| panic!("{document}"));
        (self.status, error["code"].clone(), message.to_string())
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
        found.map(|(_, value)| &value[..])
    }

    /// The documents of a stream; checks its end marker.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.header("content-type"), Some("text/event-stream"), "{}", self.body);
        let mut events: Vec<&str> = self
            .body
            .split("\n\n")
            .filter(|event| !event.is_empty())
            .map(|event| event.strip_prefix("data: ").unwrap_or_else(|| panic!("{event}")))
            .collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{}", self.body);
        events
            .iter()
            .map(|event| serde_json::from_str(event).unwrap())
            .collect()
    }
}

impl Server {
    /// The tiny model under the name `pkg`.
    pub fn start(capacity: &str, flags: &[&str]) -> Server {
        let folder = tempfile::tempdir().unwrap();
        let package = talker(folder.path(), capacity);
        Server::of(folder, &[&package], flags)
    }

    pub fn of(folder: tempfile::TempDir, packages: &[&Path], flags: &[&str]) -> Server {
        let mut command = command();
        command.arg("serve").args(packages);
        command
            .args(["--port", "0", "--threads", "2", "--device", "cpu"])
            .args(flags);
        if flags.contains(&"--log-requests") {
            command.stderr(Stdio::piped());
        }
        let mut child = command.stdout(Stdio::piped()).spawn().expect("the program starts");
        let mut line = String::new();
        let stdout = child.stdout.as_mut().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let address = line
            .strip_prefix("listening on http://")
            .and_then(|rest| rest.split(',').next());
        let address = address.unwrap_or_else(|| panic!("{line:?}")).to_string();
        Server {
            child: Some(child),
            address,
            folder,
        }
    }

    /// A server that is already running.
    pub fn at(address: String) -> Server {
        Server {
            child: None,
            address,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn child(&mut self) -> &mut Child {
        self.child.as_mut().expect("a process of its own")
    }

    /// A connection without a request yet.
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// Sends a request and leaves the connection open for reading.
    pub fn send(&self, method: &str, path: &str, headers: &[&str], body: &str) -> TcpStream {
        let mut stream = self.connect();
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n",
            self.address
        );
        for header in headers {
            head += &format!("{header}\r\n");
        }
        head += &format!("Content-Length: {}\r\n\r\n", body.len());
        // A server that refuses may answer before it has read everything.
        let _ = stream
            .write_all(head.as_bytes())
            .and_then(|()| stream.write_all(body.as_bytes()));
        stream
    }

    pub fn request(&self, method: &str, path: &str, headers: &[&str], body: &str) -> Reply {
        read(self.send(method, path, headers, body))
    }

    pub fn get(&self, path: &str) -> Reply {
        self.request("GET", path, &[], "")
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.request("POST", path, &["Content-Type: application/json"], &body.to_string())
    }

    /// The value of a metric, named with its labels except the model's.
    pub fn metric(&self, name: &str, labels: &str) -> f64 {
        let page = self.get("/metrics").body;
        let start = format!("{name}{{model_name=\"pkg\"{labels}}} ");
        let line = page.lines().find_map(|line| line.strip_prefix(&start));
        line.unwrap_or_else(|| panic!("no {start} in {page}")).parse().unwrap()
    }

    pub fn wait_for_metric(&self, name: &str, labels: &str, value: f64) {
        let start = Instant::now();
        while self.metric(name, labels) != value {
            let page = self.get("/metrics").body;
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "{name}{labels} is not {value}: {page}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn signal(&mut self, name: &str) {
        let sent = Command::new("kill")
            .args([name, &self.child().id().to_string()])
            .status();
        assert!(sent.unwrap().success());
    }

    /// What it wrote to standard error, once it has ended, line by line.
    pub fn log(&mut self) -> Vec<Value> {
        let mut text = String::new();
        let stderr = self.child().stderr.as_mut().expect("started with --log-requests");
        stderr.read_to_string(&mut text).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
            .collect()
    }

    /// Its exit status, within a minute.
    pub fn end(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child().try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < Duration::from_secs(60), "it did not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Reads a response to its end.
pub fn read(stream: TcpStream) -> Reply {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let status = line
        .split(' ')
        .nth(1)
        .unwrap_or_else(|| panic!("{line:?}"))
        .parse()
        .unwrap();
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.push((name.to_string(), value.to_string())),
            None => break,
        }
    }
    let mut reply = Reply {
        status,
        headers,
        body: String::new(),
    };
    let mut bytes = Vec::new();
    if reply.header("transfer-encoding") == Some("chunked") {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size).unwrap();
            let size = usize::from_str_radix(size.trim(), 16).unwrap_or_else(|_| panic!("{size:?}"));
            let mut chunk = vec![0; size + 2];
            reader.read_exact(&mut chunk).unwrap();
            if size == 0 {
                break;
            }
            bytes.extend_from_slice(&chunk[..size]);
        }
    } else {
        reader.read_to_end(&mut bytes).unwrap();
    }
    reply.body = String::from_utf8(bytes).unwrap();
    reply
}

/// `lapidary generate --json` of the package that a server has.
pub fn generate(server: &Server, flags: &[&str]) -> Value {
    let package = server.folder.path().join("pkg");
    let common = [
        "generate",
        text(&package),
        "--json",
        "--threads",
        "2",
        "--device",
        "cpu",
    ];
    crate::support::lapidary([&common[..], flags].concat()).ok().json()
}
