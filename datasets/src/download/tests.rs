//! Downloads from a small server on this machine that misbehaves on request.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;

use super::*;
use crate::hashing::hex;
use crate::progress::Silent;
use crate::sources::{Pg19, Source};
use sha2::{Digest, Sha256};

/// How the server answers requests for a path.
#[derive(Clone, Default)]
struct Answer {
    body: Vec<u8>,
    /// Break off after this many body bytes, on so many first requests.
    break_at: usize,
    breaks: usize,
    /// Answer so many first requests with 503.
    unavailable: usize,
    /// Send the whole file even when a range is asked for.
    no_ranges: bool,
}

/// Answers requests until dropped; remembers `path range` of each.
struct Server {
    address: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(answers: HashMap<String, Answer>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = requests.clone();
        thread::spawn(move || {
            let mut counts: HashMap<String, usize> = HashMap::new();
            for stream in listener.incoming().flatten() {
                // A client that gives up early is part of the tests.
                let _ = serve(stream, &answers, &mut counts, &log);
            }
        });
        Self { address, requests }
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

/// Serves one request and closes the connection.
fn serve(
    mut stream: TcpStream,
    answers: &HashMap<String, Answer>,
    counts: &mut HashMap<String, usize>,
    log: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut from = None;
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(range) = line.strip_prefix("range: bytes=") {
            from = range.trim_end_matches('-').parse::<usize>().ok();
        }
    }
    log.lock()
        .unwrap()
        .push(format!("{path} {}", from.unwrap_or(0)));
    let count = counts.entry(path.clone()).or_default();
    *count += 1;
    let Some(answer) = answers.get(&path) else {
        return stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
    };
    if *count <= answer.unavailable {
        let head = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        return stream.write_all(head);
    }
    let total = answer.body.len();
    let from = from.filter(|_| !answer.no_ranges);
    let (status, first) = match from {
        Some(first) => ("206 Partial Content", first),
        None => ("200 OK", 0),
    };
    let body = &answer.body[first.min(total)..];
    write!(
        stream,
        "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n",
        body.len()
    )?;
    if from.is_some() {
        write!(
            stream,
            "Content-Range: bytes {first}-{}/{total}\r\n",
            total - 1
        )?;
    }
    stream.write_all(b"\r\n")?;
    let breaks = *count - answer.unavailable <= answer.breaks;
    let sent = if breaks {
        answer.break_at.min(body.len())
    } else {
        body.len()
    };
    stream.write_all(&body[..sent])
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// A listing as the official one is written.
fn listing_of(files: &[(&str, u64, String)]) -> Vec<u8> {
    let mut sums = BTreeMap::new();
    for (name, bytes, sha256) in files {
        let address = format!("gs://deepmind-gutenberg/{name}");
        let sum = serde_json::json!({"num_bytes": bytes, "checksum": sha256});
        sums.insert(address, sum);
    }
    let infos = serde_json::json!({"default": {"license": "", "download_checksums": sums}});
    serde_json::to_vec(&infos).unwrap()
}

/// A server with a metadata file and one test book, the options to use it, and a target.
struct Scene {
    server: Server,
    options: DownloadOptions,
    dir: tempfile::TempDir,
}

const BOOK: &str = "test/860.txt";

fn book() -> Vec<u8> {
    (0..200_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

fn scene(answer: Answer) -> Scene {
    scene_listed(answer, book().len() as u64, sha256(&book()))
}

fn scene_listed(answer: Answer, bytes: u64, hash: String) -> Scene {
    let metadata = b"860,T,1850,u\n".to_vec();
    let files = [
        ("test", 5, sha256(b"")),
        ("metadata.csv", metadata.len() as u64, sha256(&metadata)),
        (BOOK, bytes, hash),
    ];
    let plain = |body| Answer {
        body,
        ..Answer::default()
    };
    let answers = HashMap::from([
        ("/infos.json".to_owned(), plain(listing_of(&files))),
        ("/pg19/metadata.csv".to_owned(), plain(metadata)),
        (format!("/pg19/{BOOK}"), answer),
    ]);
    let server = Server::start(answers);
    let options = DownloadOptions {
        bucket: format!("{}/pg19/", server.address),
        listing: format!("{}/infos.json", server.address),
        splits: [Split::Test].into(),
        backoff: Duration::from_millis(1),
        timeout: Duration::from_secs(10),
        attempts: 3,
        ..DownloadOptions::default()
    };
    let dir = tempfile::tempdir().unwrap();
    Scene {
        server,
        options,
        dir,
    }
}

impl Scene {
    fn run(&self) -> Result<DownloadReport> {
        download_pg19(self.dir.path(), &self.options, &Silent)
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join(BOOK)
    }

    fn part(&self) -> PathBuf {
        crate::fetch::part_path(&self.path())
    }

    /// First bytes of the requests made for the book.
    fn ranges(&self) -> Vec<String> {
        let prefix = format!("/pg19/{BOOK} ");
        let requests = self.server.requests();
        requests
            .iter()
            .filter_map(|r| r.strip_prefix(&prefix))
            .map(str::to_owned)
            .collect()
    }

    fn assert_clean(&self) {
        assert!(!self.path().exists() && !self.part().exists());
    }
}

fn whole() -> Answer {
    Answer {
        body: book(),
        ..Answer::default()
    }
}

#[test]
fn fetches_once_and_then_skips() {
    let scene = scene(whole());
    let report = scene.run().unwrap();
    assert_eq!((report.fetched, report.present), (2, 0));
    assert_eq!(fs::read(scene.path()).unwrap(), book());
    let entries = Pg19::new(scene.dir.path()).entries(Split::Test).unwrap();
    assert_eq!(
        (entries[0].name.as_str(), entries[0].bytes),
        ("860", 200_000)
    );
    let report = scene.run().unwrap();
    assert_eq!((report.fetched, report.present), (0, 2));
    assert_eq!(scene.ranges(), ["0"]);
}

#[test]
fn an_interrupted_transfer_goes_on_where_it_broke() {
    let scene = scene(Answer {
        break_at: 70_000,
        breaks: 2,
        ..whole()
    });
    scene.run().unwrap();
    assert_eq!(fs::read(scene.path()).unwrap(), book());
    assert_eq!(scene.ranges(), ["0", "70000", "140000"]);
    assert!(!scene.part().exists());
}

#[test]
fn a_later_run_goes_on_with_the_part_of_an_earlier_one() {
    let mut scene = scene(Answer {
        break_at: 60_000,
        breaks: 1,
        ..whole()
    });
    scene.options.attempts = 1;
    let message = scene.run().unwrap_err().to_string();
    assert!(
        message.contains("after 1 attempt") && message.contains(BOOK),
        "{message}"
    );
    assert_eq!(fs::read(scene.part()).unwrap(), book()[..60_000]);
    scene.run().unwrap();
    assert_eq!(fs::read(scene.path()).unwrap(), book());
    assert_eq!(scene.ranges(), ["0", "60000"]);
}

#[test]
fn a_complete_part_needs_no_request() {
    let scene = scene(whole());
    fs::create_dir(scene.dir.path().join("test")).unwrap();
    fs::write(scene.part(), book()).unwrap();
    scene.run().unwrap();
    assert!(scene.ranges().is_empty());
}

#[test]
fn a_server_without_ranges_starts_again() {
    let scene = scene(Answer {
        break_at: 70_000,
        breaks: 1,
        no_ranges: true,
        ..whole()
    });
    scene.run().unwrap();
    assert_eq!(fs::read(scene.path()).unwrap(), book());
}

#[test]
fn a_bad_part_is_thrown_away_and_fetched_anew() {
    let scene = scene(whole());
    fs::create_dir(scene.dir.path().join("test")).unwrap();
    for part in [vec![0; 1000], vec![0; 200_000], vec![0; 300_000]] {
        let _ = fs::remove_file(scene.path());
        fs::write(scene.part(), part).unwrap();
        scene.run().unwrap();
        assert_eq!(fs::read(scene.path()).unwrap(), book());
    }
}

#[test]
fn wrong_content_is_deleted_and_named() {
    let mut body = book();
    body[5] ^= 1;
    let scene = scene(Answer {
        body,
        ..Answer::default()
    });
    let message = scene.run().unwrap_err().to_string();
    assert!(
        message.contains("SHA-256") && message.contains(&sha256(&book())),
        "{message}"
    );
    scene.assert_clean();
    assert_eq!(scene.ranges(), ["0"]);
}

#[test]
fn wrong_lengths_are_deleted_and_named() {
    for (listed, got) in [(200_001, "200000"), (199_999, "200000"), (100, "101")] {
        let scene = scene_listed(whole(), listed, sha256(&book()));
        let error = scene.run().unwrap_err();
        assert!(matches!(error, DataError::DownloadLength { .. }), "{error}");
        let expected = format!("got {got} bytes, expected {listed}");
        assert!(error.to_string().contains(&expected), "{error}");
        scene.assert_clean();
    }
}

#[test]
fn a_missing_file_is_not_retried_and_a_busy_server_is() {
    let mut missing = scene(whole());
    missing.options.bucket.push_str("nowhere");
    let error = missing.run().unwrap_err();
    assert!(
        matches!(error, DataError::HttpStatus { got: 404, .. }),
        "{error}"
    );

    let busy = scene(Answer {
        unavailable: 2,
        ..whole()
    });
    busy.run().unwrap();
    assert_eq!(busy.ranges().len(), 3);
    let down = scene(Answer {
        unavailable: 9,
        ..whole()
    });
    let message = down.run().unwrap_err().to_string();
    assert!(
        message.contains("after 3 attempt") && message.contains("503"),
        "{message}"
    );
}

#[test]
fn no_server_is_a_clear_error() {
    let mut scene = scene(whole());
    scene.options.listing = "http://127.0.0.1:1/infos.json".to_owned();
    let message = scene.run().unwrap_err().to_string();
    assert!(message.contains("127.0.0.1:1"), "{message}");
}

#[test]
fn present_files_are_checked_by_length_or_hash() {
    let mut scene = scene(whole());
    scene.run().unwrap();
    fs::write(scene.path(), b"short").unwrap();
    assert_eq!(scene.run().unwrap().fetched, 1);
    let mut bad = book();
    bad[0] ^= 1;
    fs::write(scene.path(), bad).unwrap();
    assert_eq!(scene.run().unwrap().fetched, 0);
    scene.options.verify = true;
    assert_eq!(scene.run().unwrap().fetched, 1);
    assert_eq!(fs::read(scene.path()).unwrap(), book());
}

#[test]
fn a_local_listing_can_be_used() {
    let mut scene = scene(whole());
    let path = scene.dir.path().join("infos.json");
    fs::write(&path, listing_of(&[(BOOK, 200_000, sha256(&book()))])).unwrap();
    scene.options.listing = path.display().to_string();
    assert_eq!(scene.run().unwrap().fetched, 1);
}

#[test]
fn listings_are_selected_by_split_and_number() {
    let hash = sha256(b"");
    let names = [
        "train/10.txt",
        "train/9.txt",
        "metadata.csv",
        "test/3.txt",
        "train/100.txt",
    ];
    let files: Vec<_> = names.iter().map(|name| (*name, 1, hash.clone())).collect();
    let listing = Listing::parse(&listing_of(&files), "here").unwrap();
    assert_eq!(listing.files().len(), 5);
    let chosen = listing.select(&[Split::Train].into(), Some(2));
    let chosen: Vec<String> = chosen.iter().map(|file| file.name.to_string()).collect();
    assert_eq!(chosen, ["metadata.csv", "train/9.txt", "train/10.txt"]);
}

#[test]
fn malformed_listings_are_refused() {
    let hash = sha256(b"");
    for name in [
        "train/../../x.txt",
        "train/x.txt",
        "other/1.txt",
        "train/1.txt/..",
        "1.txt",
    ] {
        let json = listing_of(&[(name, 1, hash.clone()), (BOOK, 1, hash.clone())]);
        let message = Listing::parse(&json, "the place").unwrap_err().to_string();
        assert!(
            message.contains(name) && message.contains("the place"),
            "{message}"
        );
    }
    let bad_hash = listing_of(&[(BOOK, 1, "abc".to_owned())]);
    let no_books = listing_of(&[("metadata.csv", 1, hash)]);
    let cases: [&[u8]; 6] = [&bad_hash, &no_books, b"", b"[]", b"{\"a\": 1}", b"<html>"];
    for json in cases {
        let error = Listing::parse(json, "x").unwrap_err();
        assert!(matches!(error, DataError::Listing { .. }), "{error}");
    }
}
