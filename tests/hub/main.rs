//! Checkpoints by name, from a server on this machine that speaks the hub's protocol. The real hub is
//! not reached by any test.

#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "hub")]
mod server;

use std::fs;
use std::process::Command;

use common::{PROGRAM, assert_failed};

/// The program in a folder, with a cache there and without the user's settings.
fn program(folder: &std::path::Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    for name in [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_TOKEN_PATH",
        "HF_HUB_CACHE",
    ] {
        command.env_remove(name);
    }
    for name in [
        "RUST_LOG",
        "HF_HUB_OFFLINE",
        "http_proxy",
        "HTTP_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ] {
        command.env_remove(name);
    }
    command
        .args(arguments)
        .current_dir(folder)
        .env("HF_HOME", folder.join("home"));
    command
}

/// Both builds: what is no name is said before anything is fetched.
#[test]
fn a_name_that_is_none() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for name in ["hf:gpt2", "hf:a/b/c", "hf:../x", "hf:a/b@"] {
        let arguments = ["import", "--from", name, "--out", "out"];
        let output = program(folder.path(), &arguments)
            .output()
            .expect("it starts");
        assert_failed(&output, name, 2, &[name, "hf:OWNER/NAME@REVISION"]);
    }
    assert_eq!(fs::read_dir(folder.path()).expect("readable").count(), 0);
}

#[cfg(not(feature = "hub"))]
#[test]
fn a_build_without_downloads_says_so() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for arguments in [
        &["import", "--from", "hf:a/b", "--out", "out"][..],
        &["generate", "--checkpoint", "hf:a/b"],
    ] {
        let output = program(folder.path(), arguments)
            .output()
            .expect("it starts");
        let words = ["`hf:`", "--features hub", "hf download"];
        assert_failed(&output, "import", 2, &words);
    }
}

#[cfg(feature = "hub")]
mod hub {
    use std::path::{Path, PathBuf};
    use std::process::{Output, Stdio};
    use std::time::Duration;

    use mambabyte::hub::{Hub, Name};
    use serde_json::{Value, json};
    use tempfile::TempDir;

    use super::common::contents;
    use super::server::{COMMIT, Faults, REPOSITORY, Served, Server};
    use super::*;

    const CHECKPOINT: i32 = 4;
    const NAME: &str = "hf:JunxiongWang/MambaByte_PG19_972M";

    /// A server, and a folder in which the program runs.
    struct Scene {
        server: Server,
        folder: TempDir,
    }

    fn fixture(name: &str, file: &str) -> Vec<u8> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        fs::read(folder.join(name).join(file)).expect("a fixture")
    }

    /// The files of a repository as MambaByte's authors have published theirs.
    fn published() -> Vec<Served> {
        vec![
            Served::new(".gitattributes", "*.bin filter=lfs"),
            Served::new("README.md", "# MambaByte"),
            Served::new("config.json", fixture("layer_norm", "config.json")),
            Served::new(
                "pytorch_model.bin",
                fixture("layer_norm", "pytorch_model.bin"),
            ),
        ]
    }

    impl Scene {
        fn new(files: Vec<Served>, faults: Faults) -> Self {
            Self {
                server: Server::start(files, faults),
                folder: tempfile::tempdir().expect("a temporary folder"),
            }
        }

        fn path(&self, inside: &str) -> PathBuf {
            self.folder.path().join(inside)
        }

        /// A path in the repository's place in the cache.
        fn cached(&self, inside: &str) -> PathBuf {
            let name = REPOSITORY.replace('/', "--");
            self.path(&format!("home/hub/models--{name}/{inside}"))
        }

        fn command(&self, arguments: &[&str]) -> Command {
            let mut command = program(self.folder.path(), arguments);
            command.env("HF_ENDPOINT", &self.server.address);
            command
        }

        fn run(&self, arguments: &[&str]) -> Output {
            self.command(arguments).output().expect("it starts")
        }

        #[track_caller]
        fn ok(&self, arguments: &[&str]) -> String {
            let output = self.run(arguments);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{arguments:?}\n{said}");
            said
        }

        #[track_caller]
        fn import(&self, out: &str) -> String {
            self.ok(&["import", "--from", NAME, "--out", out])
        }

        /// An import that must fail and leave nothing behind.
        #[track_caller]
        fn fails(&self, code: i32, words: &[&str]) -> String {
            let output = self.run(&["import", "--from", NAME, "--out", "none"]);
            assert!(!self.path("none").exists());
            assert_failed(&output, "import", code, words)
        }

        /// The manifest of an imported checkpoint.
        fn manifest(&self, out: &str) -> Value {
            let text = fs::read(self.path(out).join("manifest.json")).expect("a manifest");
            serde_json::from_slice(&text).expect("JSON")
        }

        /// A hub that loses no time between attempts.
        fn hub(&self) -> Hub {
            Hub {
                endpoint: self.server.address.clone(),
                cache: self.path("home/hub"),
                token: None,
                offline: false,
                backoff: Duration::from_millis(1),
            }
        }

        /// What an impatient hub says of the repository.
        fn refusal(&self) -> String {
            let name = Name::of(Path::new(NAME))
                .expect("a name")
                .expect("a good one");
            self.hub().newest(&name).expect_err("it fails").report()
        }
    }

    /// The weights of an import of the same files from a folder.
    fn expected_weights(files: &[Served]) -> Vec<u8> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let from = folder.path().join("from");
        fs::create_dir(&from).expect("a folder");
        for file in files {
            fs::write(from.join(file.name), &file.body).expect("writable");
        }
        let arguments = ["import", "--from", "from", "--out", "out"];
        let output = program(folder.path(), &arguments)
            .output()
            .expect("it starts");
        assert!(output.status.success());
        fs::read(folder.path().join("out/model.safetensors")).expect("weights")
    }

    #[test]
    fn a_published_checkpoint_is_fetched_once_and_pinned() {
        for relative in [false, true] {
            let files = published();
            let faults = Faults {
                relative,
                ..Faults::default()
            };
            let scene = Scene::new(files.clone(), faults);
            let said = scene.import("first");
            assert!(said.contains("fetching pytorch_model.bin"), "{said}");
            assert!(said.contains(&format!("from {NAME}@{COMMIT}")), "{said}");
            // Not a terminal: no bars.
            assert!(!said.contains("==") && !said.contains('\r'), "{said}");
            let weights = fs::read(scene.path("first/model.safetensors")).expect("weights");
            assert_eq!(weights, expected_weights(&files));
            let source = scene.manifest("first")["source"].clone();
            assert_eq!(source, format!("{NAME}@{COMMIT}"));
            assert_eq!(scene.server.asked()[0], "config.json");
            assert!(!scene.server.asked().contains(&"README.md".to_owned()));

            // The layout that other programs of the hub know.
            let blob = scene.cached(&format!("blobs/{}", files[3].etag()));
            assert_eq!(fs::read(blob).expect("the content"), files[3].body);
            let link = scene.cached(&format!("snapshots/{COMMIT}/pytorch_model.bin"));
            let target = fs::read_link(link).expect("a link");
            assert_eq!(target, Path::new("../../blobs").join(files[3].etag()));
            let main = fs::read_to_string(scene.cached("refs/main")).expect("a reference");
            assert_eq!(main, COMMIT);

            // The next time only the list is asked for.
            scene.server.now(Faults::default());
            scene.import("second");
            assert_eq!(scene.server.requests().len(), 1);
            assert_eq!(scene.server.asked(), [""; 0]);
        }
    }

    #[test]
    fn a_pinned_commit_that_is_complete_needs_no_request() {
        let scene = Scene::new(published(), Faults::default());
        let pinned = format!("{NAME}@{COMMIT}");
        scene.ok(&["import", "--from", &pinned, "--out", "first"]);
        scene.server.now(Faults::default());
        scene.ok(&["import", "--from", &pinned, "--out", "second"]);
        assert_eq!(scene.server.requests(), []);
    }

    #[test]
    fn weights_in_several_files() {
        let weights = expected_weights(&published());
        // The same weights with mamba_ssm's names, in three files of safetensors.
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir(folder.path().join("from")).expect("a folder");
        for file in published() {
            fs::write(folder.path().join("from").join(file.name), file.body).expect("writable");
        }
        for line in [
            "import --from from --out ours",
            "export --checkpoint ours --format mamba-ssm --out theirs",
        ] {
            let arguments: Vec<&str> = line.split(' ').collect();
            let output = program(folder.path(), &arguments)
                .output()
                .expect("it starts");
            assert!(output.status.success());
        }
        let whole = fs::read(folder.path().join("theirs/model.safetensors")).expect("weights");
        let whole = safetensors::SafeTensors::deserialize(&whole).expect("safetensors");
        let names = [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
        ];
        let mut map = serde_json::Map::new();
        let mut files = vec![
            Served::new("config.json", fixture("layer_norm", "config.json")),
            // Not the index's: it must not be taken.
            Served::new("pytorch_model.bin", "other weights"),
        ];
        for (i, file) in names.iter().enumerate() {
            let part = whole.tensors().into_iter().skip(i).step_by(3);
            let part: Vec<_> = part
                .inspect(|(name, _)| {
                    map.insert(name.clone(), json!(file));
                })
                .collect();
            let body = safetensors::serialize(part, None).expect("safetensors");
            files.push(Served::new(file, body));
        }
        let index = json!({"metadata": {}, "weight_map": map}).to_string();
        files.push(Served::new("model.safetensors.index.json", index));
        let scene = Scene::new(files.clone(), Faults::default());
        scene.import("out");
        let ours = fs::read(scene.path("out/model.safetensors")).expect("weights");
        assert_eq!(ours, weights);
        assert!(
            !scene
                .server
                .asked()
                .contains(&"pytorch_model.bin".to_owned())
        );

        // An index that names what is not there.
        files.remove(3);
        let scene = Scene::new(files, Faults::default());
        scene.fails(CHECKPOINT, &[NAME, names[1]]);
    }

    #[test]
    fn mamba_2_is_refused_before_its_weights_are_fetched() {
        let config = r#"{"d_model": 768, "n_layer": 24, "ssm_cfg": {"layer": "Mamba2"}}"#;
        let files = vec![
            Served::new("config.json", config),
            Served::new("pytorch_model.bin", vec![0; 1000]),
        ];
        let scene = Scene::new(files, Faults::default());
        scene.fails(CHECKPOINT, &["Mamba-2", "`mamba2-`"]);
        assert_eq!(scene.server.asked(), ["config.json"]);
    }

    #[test]
    fn a_repository_without_weights() {
        let files = published().into_iter().take(3).collect();
        let scene = Scene::new(files, Faults::default());
        scene.fails(CHECKPOINT, &[NAME, "has no weights"]);
    }

    #[test]
    fn wrong_content_is_refused_and_deleted() {
        let mut files = published();
        let mut wrong = files[3].body.clone();
        wrong[5000] ^= 1;
        files[3].instead = Some(wrong);
        let etag = files[3].etag();
        let scene = Scene::new(files, Faults::default());
        scene.fails(CHECKPOINT, &[NAME, "SHA-256", &etag]);
        assert!(!scene.cached(&format!("blobs/{etag}")).exists());
        assert!(!scene.cached(&format!("blobs/{etag}.part")).exists());
        assert_eq!(scene.server.ranges(), [0]);
    }

    #[test]
    fn content_of_another_length_is_refused_and_deleted() {
        for (length, listed) in [(9000, 18517), (30_000, 18517)] {
            let mut files = published();
            files[3].instead = Some(vec![7; length]);
            assert_eq!(files[3].body.len(), listed);
            let etag = files[3].etag();
            let scene = Scene::new(files, Faults::default());
            scene.fails(CHECKPOINT, &[NAME, "bytes, expected 18517"]);
            assert!(!scene.cached(&format!("blobs/{etag}.part")).exists());
        }
    }

    #[test]
    fn a_transfer_that_breaks_goes_on_where_it_broke() {
        let files = published();
        let faults = Faults {
            break_at: (8000, 1),
            ..Faults::default()
        };
        let scene = Scene::new(files.clone(), faults);
        scene.import("out");
        assert_eq!(scene.server.ranges(), [0, 8000]);
        let weights = fs::read(scene.path("out/model.safetensors")).expect("weights");
        assert_eq!(weights, expected_weights(&files));
    }

    #[test]
    fn what_arrived_before_the_network_failed_is_kept() {
        let files = published();
        let faults = Faults {
            break_at: (1000, 99),
            ..Faults::default()
        };
        let scene = Scene::new(files.clone(), faults);
        let said = scene.refusal();
        assert!(said.contains("what has arrived is kept"), "{said}");
        assert_eq!(scene.server.ranges(), [0, 1000, 2000, 3000, 4000]);
        let part = scene.cached(&format!("blobs/{}.part", files[3].etag()));
        assert_eq!(fs::read(part).expect("a part"), files[3].body[..5000]);
        scene.server.now(Faults::default());
        scene.import("out");
        assert_eq!(scene.server.ranges(), [5000]);
    }

    #[test]
    fn a_part_that_is_no_part_of_it_is_thrown_away() {
        let files = published();
        for part in [vec![0; 1000], vec![0; 18_517], vec![0; 20_000]] {
            for no_ranges in [false, true] {
                let faults = Faults {
                    no_ranges,
                    ..Faults::default()
                };
                let scene = Scene::new(files.clone(), faults);
                fs::create_dir_all(scene.cached("blobs")).expect("a folder");
                let place = scene.cached(&format!("blobs/{}.part", files[3].etag()));
                fs::write(place, &part).expect("writable");
                let name = Name::of(Path::new(NAME))
                    .expect("a name")
                    .expect("a good one");
                let found = scene.hub().newest(&name).expect("it is fetched");
                let weights = fs::read(found.folder.join("pytorch_model.bin"));
                assert_eq!(weights.expect("the weights"), files[3].body);
            }
        }
    }

    #[test]
    fn a_busy_server_is_asked_again() {
        for status in ["429 Too Many Requests", "500 Internal Server Error"] {
            let faults = Faults {
                first: (1, status),
                ..Faults::default()
            };
            let scene = Scene::new(published(), faults);
            scene.import("out");
            assert_eq!(scene.server.ranges(), [0, 0]);
            let faults = Faults {
                first: (99, status),
                ..Faults::default()
            };
            let scene = Scene::new(published(), faults);
            let said = scene.refusal();
            assert!(
                said.contains(&status[..3]) && said.contains("5 times"),
                "{said}"
            );
        }
    }

    #[test]
    fn tokens_go_to_the_hub_and_nowhere_else() {
        let faults = Faults {
            token: Some("hf_good"),
            ..Faults::default()
        };
        let arguments = ["import", "--from", NAME, "--out", "out"];

        let scene = Scene::new(published(), faults.clone());
        scene.fails(CHECKPOINT, &["401", "set HF_TOKEN"]);
        let output = scene.command(&arguments).env("HF_TOKEN", "hf_bad").output();
        let said = assert_failed(&output.expect("it starts"), "import", CHECKPOINT, &["401"]);
        assert!(
            said.contains("token is valid") && !said.contains("hf_bad"),
            "{said}"
        );

        // From the variable, and from the file that `hf auth login` writes.
        for variable in [true, false] {
            let scene = Scene::new(published(), faults.clone());
            let mut command = scene.command(&arguments);
            match variable {
                true => {
                    command.env("HF_TOKEN", "hf_good\n");
                }
                false => {
                    fs::create_dir(scene.path("home")).expect("a folder");
                    fs::write(scene.path("home/token"), "hf_good\n").expect("writable");
                }
            }
            let output = command.output().expect("it starts");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{said}");
            assert!(!said.contains("hf_good"), "{said}");
            for request in scene.server.requests() {
                let expected = (request.host == "hub").then_some("hf_good");
                assert_eq!(request.token.as_deref(), expected, "{request:?}");
            }
            assert_eq!(scene.server.ranges(), [0]);
        }
    }

    #[test]
    fn what_is_not_there() {
        let scene = Scene::new(published(), Faults::default());
        for name in ["hf:nobody/nothing", &format!("{NAME}@v9")] {
            let output = scene.run(&["import", "--from", name, "--out", "none"]);
            assert_failed(
                &output,
                name,
                CHECKPOINT,
                &[name, "404", "check owner, name"],
            );
        }
    }

    #[test]
    fn without_a_network() {
        let scene = Scene::new(published(), Faults::default());
        let offline = ["import", "--from", NAME, "--out", "none", "--offline"];
        let output = scene.run(&offline);
        assert_failed(
            &output,
            "import",
            CHECKPOINT,
            &[NAME, "is not there", "--offline"],
        );
        scene.import("first");
        scene.server.now(Faults::default());
        scene.ok(&["import", "--from", NAME, "--out", "second", "--offline"]);
        let mut command = scene.command(&["import", "--from", NAME, "--out", "third"]);
        let output = command
            .env("HF_HUB_OFFLINE", "1")
            .output()
            .expect("it starts");
        assert!(output.status.success());
        assert_eq!(scene.server.requests(), []);
        let same =
            |out: &str| fs::read(scene.path(out).join("model.safetensors")).expect("weights");
        assert_eq!(same("first"), same("second"));
        assert_eq!(
            scene.manifest("third")["source"],
            format!("{NAME}@{COMMIT}")
        );
    }

    #[test]
    fn an_altered_cache_is_noticed_and_mended() {
        let files = published();
        let scene = Scene::new(files.clone(), Faults::default());
        scene.import("first");
        let blob = scene.cached(&format!("blobs/{}", files[3].etag()));
        let mut bytes = files[3].body.clone();
        bytes[9000] ^= 4;
        fs::write(&blob, bytes).expect("writable");
        let output = scene.run(&["import", "--from", NAME, "--out", "none", "--offline"]);
        assert_failed(&output, "import", CHECKPOINT, &["was altered", "SHA-256"]);
        scene.server.now(Faults::default());
        scene.import("second");
        assert_eq!(scene.server.ranges(), [0]);
        assert_eq!(fs::read(&blob).expect("the content"), files[3].body);
    }

    #[test]
    fn a_disk_that_is_too_small_is_said_before_anything_is_fetched() {
        let mut files = published();
        files[3].listed = Some(1 << 60);
        let scene = Scene::new(files, Faults::default());
        scene.fails(1, &["are to be fetched", "are free", "HF_HOME"]);
        assert_eq!(scene.server.ranges(), [0; 0]);
    }

    #[test]
    fn a_cache_that_cannot_be_written() {
        let scene = Scene::new(published(), Faults::default());
        fs::write(scene.path("home"), "a file").expect("writable");
        scene.fails(1, &["could not create"]);
    }

    #[test]
    fn hostile_lists_write_nowhere_else() {
        let listing = |name: &str, hash: &str| {
            let lfs = json!({"sha256": hash, "size": 3, "pointerSize": 134});
            let file = json!({"rfilename": name, "size": 3, "blobId": COMMIT, "lfs": lfs});
            json!({"sha": COMMIT, "siblings": [file]}).to_string()
        };
        let good = "ab".repeat(32);
        let long = "../".repeat(21) + "x";
        let commit = json!({"sha": "../../../../../../../../../../../../../x", "siblings": []});
        for list in [
            listing("../../../../../evil.bin", &good),
            listing("/evil.bin", &good),
            listing("evil.bin", &long),
            listing("evil.bin", "/evil"),
            commit.to_string(),
            "<html>".to_owned(),
            "[".repeat(100_000),
        ] {
            let faults = Faults {
                listing: Some(list),
                ..Faults::default()
            };
            let scene = Scene::new(published(), faults);
            scene.fails(CHECKPOINT, &[NAME]);
            let there = contents(scene.folder.path());
            assert!(there.is_empty(), "{there:?}");
        }
    }

    #[test]
    fn a_name_serves_wherever_a_checkpoint_does() {
        let scene = Scene::new(published(), Faults::default());
        let line = |seed: &'static str| {
            let mut line = vec!["generate", "--checkpoint", NAME, "--device", "cpu"];
            line.extend(["--max-new-bytes", "20", "--prompt", "The ", "--seed", seed]);
            line
        };
        let first = scene.run(&line("1"));
        assert!(first.status.success());
        assert_eq!(first.stdout.len(), 20);
        // From then on it is on this disk, converted.
        scene.server.now(Faults::default());
        assert_eq!(scene.run(&line("1")).stdout, first.stdout);
        assert_eq!(scene.server.requests(), []);
        let manifest = scene.cached(&format!("mambabyte/{COMMIT}/manifest.json"));
        assert!(manifest.is_file());
        scene.ok(&["params", "--checkpoint", NAME]);
    }

    #[test]
    fn two_at_once_fetch_once() {
        let scene = Scene::new(published(), Faults::default());
        let started: Vec<_> = ["a", "b", "c"]
            .map(|out| {
                let arguments = ["import", "--from", NAME, "--out", out];
                let mut command = scene.command(&arguments);
                command.stderr(Stdio::piped()).spawn().expect("it starts")
            })
            .into();
        for child in started {
            let output = child.wait_with_output().expect("it ends");
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{said}");
        }
        assert_eq!(scene.server.ranges(), [0]);
    }
}
