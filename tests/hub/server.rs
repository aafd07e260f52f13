//! The hub as its protocol is, small and on this machine: an API that lists a repository's files, an
//! address for each file, and another host that has the contents of the large ones. It misbehaves on
//! request.

use std::collections::HashMap;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::json;
use sha2::{Digest as _, Sha256};

pub const COMMIT: &str = "2f582fc0123456789abcdef0123456789abcdef0";
pub const REPOSITORY: &str = "JunxiongWang/MambaByte_PG19_972M";

/// A file of the repository.
#[derive(Clone)]
pub struct Served {
    pub name: &'static str,
    pub body: Vec<u8>,
    /// What is sent in place of `body`, under the hash of `body`.
    pub instead: Option<Vec<u8>>,
    /// Length that is listed, if not the body's.
    pub listed: Option<u64>,
}

/// What goes wrong.
#[derive(Clone, Default)]
pub struct Faults {
    /// So many first answers about large files are this status line, with headers.
    pub first: (usize, &'static str),
    /// Every request without this token is answered with 401.
    pub token: Option<&'static str>,
    /// The connection breaks after so many bytes of a large file, on so many first requests.
    pub break_at: (usize, usize),
    /// Large files come whole, whatever part was asked for.
    pub no_ranges: bool,
    /// Answer of the API in place of the list.
    pub listing: Option<String>,
    /// Small files are behind a redirect that names no host, as the hub's newer ones.
    pub relative: bool,
}

/// A request: host, path, first byte, token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub host: &'static str,
    pub path: String,
    pub from: Option<u64>,
    pub token: Option<String>,
}

pub struct Server {
    pub address: String,
    requests: Arc<Mutex<Vec<Request>>>,
    state: Arc<State>,
}

struct State {
    files: Vec<Served>,
    faults: Mutex<Faults>,
    contents: String,
    large_requests: Mutex<usize>,
}

impl Served {
    pub fn new(name: &'static str, body: impl Into<Vec<u8>>) -> Self {
        Self {
            name,
            body: body.into(),
            instead: None,
            listed: None,
        }
    }

    /// The hub keeps weights as large files.
    fn is_large(&self) -> bool {
        self.name.ends_with(".bin") || self.name.ends_with(".safetensors")
    }

    /// The name of the content: its SHA-256, or what stands for git's hash of it.
    pub fn etag(&self) -> String {
        let hash = Sha256::digest(&self.body);
        let digits: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        match self.is_large() {
            true => digits,
            false => digits[..40].to_owned(),
        }
    }
}

impl Server {
    pub fn start(files: Vec<Served>, faults: Faults) -> Self {
        let bind = |host: &str| TcpListener::bind((host, 0)).expect("a free port");
        let (hub, contents) = (bind("127.0.0.1"), bind("127.0.0.2"));
        let url = |it: &TcpListener| format!("http://{}", it.local_addr().expect("an address"));
        let state = Arc::new(State {
            files,
            faults: Mutex::new(faults),
            contents: url(&contents),
            large_requests: Mutex::new(0),
        });
        let server = Self {
            address: url(&hub),
            requests: Arc::default(),
            state,
        };
        server.listen("hub", hub, State::hub);
        server.listen("contents", contents, State::contents);
        server
    }

    fn listen(&self, host: &'static str, listener: TcpListener, answer: Answer) {
        let (requests, state) = (Arc::clone(&self.requests), Arc::clone(&self.state));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (requests, state) = (Arc::clone(&requests), Arc::clone(&state));
                thread::spawn(move || {
                    // A client that goes away is part of the tests.
                    let _ = serve(host, stream, &requests, &state, answer);
                });
            }
        });
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("no panic before").clone()
    }

    /// Forgets the requests so far, and goes wrong in another way.
    pub fn now(&self, faults: Faults) {
        self.requests.lock().expect("no panic before").clear();
        *self.state.faults.lock().expect("no panic before") = faults;
        *self.state.large_requests.lock().expect("no panic before") = 0;
    }

    /// First bytes of the requests for contents of large files.
    pub fn ranges(&self) -> Vec<u64> {
        let requests = self.requests();
        let large = requests.iter().filter(|it| it.host == "contents");
        large.map(|it| it.from.unwrap_or(0)).collect()
    }

    /// Names of the files that were asked for at the hub, in order.
    pub fn asked(&self) -> Vec<String> {
        let requests = self.requests();
        let asked = requests.iter().filter(|it| it.path.contains("/resolve/"));
        asked
            .filter_map(|it| it.path.rsplit('/').next().map(str::to_owned))
            .collect()
    }
}

type Answer = fn(&State, &Request, TcpStream) -> io::Result<()>;

fn serve(
    host: &'static str,
    stream: TcpStream,
    requests: &Mutex<Vec<Request>>,
    state: &State,
    answer: Answer,
) -> io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let mut headers = HashMap::new();
    for line in lines {
        let line = line?;
        match line.split_once(": ") {
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.to_owned()),
            None => break,
        };
    }
    let from = headers.get("range").and_then(|it| {
        let first = it.strip_prefix("bytes=")?.strip_suffix('-')?;
        first.parse().ok()
    });
    let token = headers.get("authorization");
    let request = Request {
        host,
        path: first.split(' ').nth(1).unwrap_or_default().to_owned(),
        from,
        token: token.map(|it| it.replace("Bearer ", "")),
    };
    requests
        .lock()
        .expect("no panic before")
        .push(request.clone());
    answer(state, &request, stream)
}

fn reply(mut to: TcpStream, status: &str, headers: &str, body: &[u8]) -> io::Result<()> {
    write!(
        to,
        "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
        body.len()
    )?;
    to.write_all(body)
}

impl State {
    fn faults(&self) -> Faults {
        self.faults.lock().expect("no panic before").clone()
    }

    /// The host of the API and of the files' addresses.
    fn hub(&self, request: &Request, to: TcpStream) -> io::Result<()> {
        let faults = self.faults();
        if faults.token.is_some() && faults.token != request.token.as_deref() {
            let headers = "X-Error-Code: RepoNotFound\r\n";
            return reply(
                to,
                "401 Unauthorized",
                headers,
                b"Invalid username or password.",
            );
        }
        let path = request.path.as_str();
        let known = ["main", COMMIT]
            .iter()
            .any(|it| path == format!("/api/models/{REPOSITORY}/revision/{it}?blobs=true"));
        if known {
            let list = faults.listing.unwrap_or_else(|| self.listing());
            return reply(
                to,
                "200 OK",
                "Content-Type: application/json\r\n",
                list.as_bytes(),
            );
        }
        let direct = format!("/{REPOSITORY}/resolve/{COMMIT}/");
        let cached = format!("/api/resolve-cache/models/{REPOSITORY}/{COMMIT}/");
        let name = path.strip_prefix(&direct).or(path.strip_prefix(&cached));
        let Some(file) = name.and_then(|name| self.files.iter().find(|it| it.name == name)) else {
            return reply(to, "404 Not Found", "X-Error-Code: EntryNotFound\r\n", b"");
        };
        let headers = format!("X-Repo-Commit: {COMMIT}\r\n");
        if file.is_large() {
            let headers = headers
                + &format!(
                    "X-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {}\r\nLocation: {}/{etag}\r\n",
                    file.body.len(),
                    self.contents,
                    etag = file.etag(),
                );
            return reply(to, "302 Found", &headers, b"");
        }
        let headers = headers + &format!("ETag: \"{}\"\r\n", file.etag());
        match faults.relative && path.starts_with(&direct) {
            true => {
                let headers = headers + &format!("Location: {cached}{}\r\n", file.name);
                reply(to, "307 Temporary Redirect", &headers, b"")
            }
            false => reply(to, "200 OK", &headers, &file.body),
        }
    }

    /// The answer of the API.
    fn listing(&self) -> String {
        let files: Vec<_> = self
            .files
            .iter()
            .map(|file| {
                let size = file.listed.unwrap_or(file.body.len() as u64);
                let mut entry = json!({
                    "rfilename": file.name,
                    "size": size,
                    "blobId": &file.etag()[..40],
                });
                if file.is_large() {
                    let lfs = json!({"sha256": file.etag(), "size": size, "pointerSize": 134});
                    entry["lfs"] = lfs;
                }
                entry
            })
            .collect();
        json!({"id": REPOSITORY, "sha": COMMIT, "private": false, "siblings": files}).to_string()
    }

    /// The host of the large files' contents.
    fn contents(&self, request: &Request, mut to: TcpStream) -> io::Result<()> {
        let faults = self.faults();
        let number = {
            let mut number = self.large_requests.lock().expect("no panic before");
            *number += 1;
            *number
        };
        if number <= faults.first.0 {
            return reply(to, faults.first.1, "Retry-After: 0\r\n", b"");
        }
        let etag = request.path.trim_start_matches('/');
        let Some(file) = self.files.iter().find(|it| it.etag() == etag) else {
            return reply(to, "404 Not Found", "", b"");
        };
        let body = file.instead.as_ref().unwrap_or(&file.body);
        let from = request.from.filter(|_| !faults.no_ranges);
        let first = from.unwrap_or(0).min(body.len() as u64) as usize;
        let status = match from {
            Some(_) => "206 Partial Content",
            None => "200 OK",
        };
        write!(
            to,
            "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n",
            body.len() - first
        )?;
        if from.is_some() {
            let last = body.len() - 1;
            write!(to, "Content-Range: bytes {first}-{last}/{}\r\n", body.len())?;
        }
        to.write_all(b"\r\n")?;
        let (at, times) = faults.break_at;
        let end = match number <= times {
            true => body.len().min(first + at),
            false => body.len(),
        };
        to.write_all(&body[first..end])
    }
}
