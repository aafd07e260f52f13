//! The commands `data …`: from text on disk or on the net to shards, and a look at them.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, Subcommand, ValueEnum};
use mambabyte_datasets::download::{DownloadOptions, PG19_BUCKET, PG19_LISTING, download_pg19};
use mambabyte_datasets::progress::Bar;
use mambabyte_datasets::sources::{
    CargoOptions, CargoSources, HeldOut, Pg19, Source, TextFolder, TextOptions,
};
use mambabyte_datasets::{DataError, PrepareOptions, Shards, Split, Summary, prepare};
use serde_json::json;

use super::{grouped, json_text, print, scaled, split};
use crate::error::{Error, Result};

/// The commands below `data`.
#[derive(Clone, Debug, Subcommand)]
pub enum DataCommand {
    /// Turn text into the shards that training reads
    Prepare(PrepareArgs),
    /// Fetch PG-19 (11.7 GB) from its public bucket; run again to go on
    Download(DownloadArgs),
    /// Compare every byte of prepared data with its checksum
    Verify(ShardsArgs),
    /// Describe prepared data
    Info(ShardsArgs),
}

/// Where text comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SourceKind {
    /// A copy of PG-19, as `data download` makes it
    Pg19,
    /// A folder of text, read recursively, or a single file
    Text,
    /// The Rust sources that cargo has unpacked on this machine
    Cargo,
}

/// Arguments of `data prepare`.
#[derive(Clone, Debug, Args)]
pub struct PrepareArgs {
    /// Kind of the text
    #[arg(long, value_enum)]
    pub source: SourceKind,
    /// Where it lies; for cargo its home folder, which is found if left out
    #[arg(long, value_name = "PATH", required_if_eq_any = [("source", "pg19"), ("source", "text")])]
    pub path: Option<PathBuf>,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Splits to write, separated by commas
    #[arg(long, value_name = "SPLITS", value_delimiter = ',', default_value = "train,validation,test", value_parser = split)]
    pub splits: Vec<Split>,
    /// Bytes of a split at most; no limit if left out
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_bytes: Option<u64>,
    /// Bytes at which a shard is closed
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 30, value_parser = clap::value_parser!(u64).range(1..))]
    pub max_shard_bytes: u64,
    /// Fraction held out for validation, and again for testing (text and cargo) [default: 0.02; of one or two
    /// files of text 0.05]
    #[arg(long, value_name = "FRACTION", value_parser = super::held_out)]
    pub held_out: Option<f64>,
    /// File name extensions to take, separated by commas; all if left out (text only)
    #[arg(long, value_name = "EXT", value_delimiter = ',')]
    pub extensions: Vec<String>,
    /// Replace splits that exist
    #[arg(long)]
    pub overwrite: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `data download`.
#[derive(Clone, Debug, Args)]
pub struct DownloadArgs {
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Splits to fetch, separated by commas
    #[arg(long, value_name = "SPLITS", value_delimiter = ',', default_value = "train,validation,test", value_parser = split)]
    pub splits: Vec<Split>,
    /// Address below which the files lie
    #[arg(long, value_name = "URL", default_value = PG19_BUCKET)]
    pub base_url: String,
    /// Address or path of the listing of lengths and SHA-256 hashes
    #[arg(long, value_name = "URL", default_value = PG19_LISTING)]
    pub listing: String,
    /// Books of each split at most; all if left out
    #[arg(long, value_name = "N")]
    pub max_books: Option<usize>,
    /// Also check the hash of files that are already there
    #[arg(long)]
    pub verify: bool,
    /// Files fetched at the same time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub parallel: u16,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `data verify` and `data info`.
#[derive(Clone, Debug, Args)]
pub struct ShardsArgs {
    /// Folder written by `data prepare`, or one split of it
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs one of the commands.
pub fn run(command: &DataCommand) -> Result<()> {
    print(&output(command)?)
}

/// Does what the command says, and gives what is to be printed.
fn output(command: &DataCommand) -> Result<String> {
    match command {
        DataCommand::Prepare(args) => prepare_shards(args),
        DataCommand::Download(args) => download(args),
        DataCommand::Verify(args) => verify(args),
        DataCommand::Info(args) => info(args),
    }
}

fn prepare_shards(args: &PrepareArgs) -> Result<String> {
    let start = Instant::now();
    let source = open_source(args)?;
    let options = PrepareOptions {
        splits: args.splits.clone(),
        max_shard_bytes: args.max_shard_bytes,
        max_bytes: args.max_bytes,
        overwrite: args.overwrite,
    };
    let summary = match prepare(source.as_ref(), &args.out, &options, &Bar::new()) {
        // The library knows of no command line, so the flag is named here.
        Err(DataError::SplitExists { path, .. }) => {
            return Err(Error::Usage {
                message: format!("`{}` already holds data", path.display()),
                hint: "pass `--overwrite`, or choose another folder with `--out`".to_owned(),
            });
        }
        other => other?,
    };
    if args.json {
        json_text(&summary)
    } else {
        Ok(describe_prepared(&summary, start.elapsed().as_secs_f64()))
    }
}

fn open_source(args: &PrepareArgs) -> Result<Box<dyn Source>> {
    if args.source == SourceKind::Pg19 && args.held_out.is_some() {
        return Err(Error::Usage {
            message: "`--held-out` does not apply to PG-19, which has splits of its own".to_owned(),
            hint: "leave it out".to_owned(),
        });
    }
    if args.source != SourceKind::Text && !args.extensions.is_empty() {
        return Err(Error::Usage {
            message: "`--extensions` applies to `--source text` only".to_owned(),
            hint: "leave it out".to_owned(),
        });
    }
    let path = args.path.clone().unwrap_or_default();
    if args.source == SourceKind::Text && lies_in(&args.out, &path) {
        return Err(Error::Usage {
            message: format!(
                "`--out {}` lies in `--path {}`: the shards of one split would be read as text of the \
                 next",
                args.out.display(),
                path.display()
            ),
            hint: "write to a folder outside of the text".to_owned(),
        });
    }
    let held_out = args.held_out.map(HeldOut::each);
    Ok(match args.source {
        SourceKind::Pg19 => Box::new(Pg19::new(path)),
        SourceKind::Text => {
            let defaults = TextOptions::default();
            let options = TextOptions {
                extensions: args.extensions.clone(),
                held_out: held_out.unwrap_or(defaults.held_out),
                cut: held_out.unwrap_or(defaults.cut),
            };
            let folder = TextFolder::new(path, options)?;
            warn_of_stand_ins(folder.stand_ins()?, "files");
            Box::new(folder)
        }
        SourceKind::Cargo => {
            let defaults = CargoOptions::default();
            let sources = CargoSources::scan(&CargoOptions {
                cargo_home: args.path.clone(),
                held_out: held_out.unwrap_or(defaults.held_out),
                max_bytes: args.max_bytes,
                ..defaults
            })?;
            let report = sources.report();
            tracing::info!(
                "{} crates: {} files taken; left out: {} duplicates, {} empty, {} not UTF-8, {} too \
                 long, {} over the limit",
                report.crates,
                report.taken,
                report.duplicates,
                report.empty,
                report.not_utf8,
                report.too_long,
                report.over_cap
            );
            warn_of_stand_ins(report.stand_ins, "crates");
            Box::new(sources)
        }
    })
}

/// Whether `inner`, of which the last folders may not exist yet, is `outer` or lies in it.
fn lies_in(inner: &Path, outer: &Path) -> bool {
    let Ok(outer) = outer.canonicalize() else {
        return false;
    };
    let inner = std::path::absolute(inner).unwrap_or_else(|_| inner.to_owned());
    let there = inner.ancestors().find_map(|it| it.canonicalize().ok());
    there.is_some_and(|it| it.starts_with(&outer))
}

/// Says so where what is held out may not stay held out.
fn warn_of_stand_ins(count: usize, what: &str) {
    if count > 0 {
        tracing::warn!(
            "there are few {what}: {count} of those held out are so only because a split would be \
             empty otherwise. If {what} are added and the data is prepared again they may move into \
             training"
        );
    }
}

fn describe_prepared(summary: &Summary, seconds: f64) -> String {
    let mut text = String::new();
    for split in &summary.splits {
        let _ = writeln!(
            text,
            "{:<10}  {:>15} bytes  {:>9} documents  {:>4} shards  {}",
            split.split,
            grouped(split.bytes),
            grouped(split.documents),
            split.shards,
            split.dir.display()
        );
    }
    let bytes: u64 = summary.splits.iter().map(|it| it.bytes).sum();
    let _ = writeln!(
        text,
        "prepared {} of {} in {seconds:.1} s",
        scaled(bytes as f64, "B"),
        summary.source
    );
    text
}

fn download(args: &DownloadArgs) -> Result<String> {
    let options = DownloadOptions {
        bucket: args.base_url.trim_end_matches('/').to_owned(),
        listing: args.listing.clone(),
        splits: args.splits.iter().copied().collect(),
        max_books: args.max_books,
        verify: args.verify,
        parallel: args.parallel.into(),
        ..DownloadOptions::default()
    };
    let report = download_pg19(&args.out, &options, &Bar::new())?;
    if args.json {
        return json_text(&report);
    }
    Ok(format!(
        "fetched {} files ({}), {} were there already ({})\nnext: mambabyte data prepare --source \
         pg19 --path {} --out data/pg19\n",
        report.fetched,
        scaled(report.fetched_bytes as f64, "B"),
        report.present,
        scaled(report.present_bytes as f64, "B"),
        args.out.display()
    ))
}

fn verify(args: &ShardsArgs) -> Result<String> {
    let mut reports = serde_json::Map::new();
    let mut text = String::new();
    for (name, shards) in open_splits(&args.dir)? {
        let report = shards.verify(&Bar::new())?;
        let _ = writeln!(
            text,
            "{name:<10}  ok: {} bytes in {} shards, {} blocks agree with their checksums",
            grouped(report.bytes),
            report.shards,
            grouped(report.blocks)
        );
        reports.insert(name, json!(report));
    }
    if args.json {
        json_text(&reports)
    } else {
        Ok(text)
    }
}

fn info(args: &ShardsArgs) -> Result<String> {
    let mut infos = serde_json::Map::new();
    let mut text = String::new();
    for (name, shards) in open_splits(&args.dir)? {
        let info = shards.info();
        let _ = write!(
            text,
            "{name}\n\
             \x20 bytes          {}\n\
             \x20 documents      {}\n\
             \x20 words          {}\n",
            grouped(info.bytes),
            grouped(info.documents),
            grouped(info.words),
        );
        if let Some(ratio) = info.bytes_per_word() {
            let _ = writeln!(text, "  bytes a word   {ratio:.5}");
        }
        let _ = writeln!(
            text,
            "  shards         {} (format {}) in {}\n  identity       {}",
            info.shards.len(),
            info.format,
            info.dir.display(),
            info.identity
        );
        infos.insert(name, json!(info));
    }
    if args.json {
        json_text(&infos)
    } else {
        Ok(text)
    }
}

/// The splits in a folder of `data prepare`; or the one split that the folder itself is.
fn open_splits(dir: &Path) -> Result<Vec<(String, Shards)>> {
    let mut splits = Vec::new();
    for split in Split::ALL {
        let folder = dir.join(split.as_str());
        if folder.is_dir() {
            splits.push((split.to_string(), Shards::open(&folder)?));
        }
    }
    if splits.is_empty() {
        // Its error says what is missing where nothing is there.
        let name = dir.file_name().unwrap_or(dir.as_os_str());
        splits.push((name.to_string_lossy().into_owned(), Shards::open(dir)?));
    }
    Ok(splits)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser;

    use super::super::{Cli, Command};
    use super::*;

    fn run_line(words: &[&str]) -> Result<String> {
        let words = ["mambabyte", "data"].iter().chain(words);
        match Cli::try_parse_from(words)
            .expect("a valid command line")
            .command
        {
            Command::Data(command) => output(&command),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn text_is_prepared_verified_and_described() {
        let folder = tempfile::tempdir().expect("a folder");
        let text = folder.path().join("text");
        fs::create_dir(&text).expect("a folder");
        for index in 0..9 {
            let content = format!("document {index}\n").repeat(50);
            fs::write(text.join(format!("{index}.txt")), content).expect("a file");
        }
        let out = folder.path().join("data");
        let (text, out) = (text.display().to_string(), out.display().to_string());
        let line = [
            "prepare", "--source", "text", "--path", &text, "--out", &out,
        ];
        let text = run_line(&line).expect("prepared");
        assert_eq!(text.matches(" documents ").count(), 3, "{text}");
        let text = run_line(&["verify", &out]).expect("verified");
        assert_eq!(text.matches("ok: ").count(), 3, "{text}");
        let text = run_line(&["info", &out]).expect("described");
        assert_eq!(text.matches("identity").count(), 3, "{text}");
        let text = run_line(&["info", &format!("{out}/train"), "--json"]).expect("described");
        let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert!(
            json["train"]["bytes"]
                .as_u64()
                .is_some_and(|bytes| bytes > 0),
            "{text}"
        );

        let again = run_line(&line).expect_err("it is there already");
        assert_eq!(again.exit_code(), 2);
        assert!(again.report().contains("--overwrite"), "{}", again.report());
        run_line(&[&line[..], &["--overwrite"]].concat()).expect("prepared again");

        let shard = fs::read_dir(format!("{out}/train"))
            .expect("a folder")
            .next()
            .expect("a shard")
            .expect("an entry")
            .path();
        let mut bytes = fs::read(&shard).expect("a shard");
        let end = bytes.len() - 1;
        bytes.truncate(end);
        fs::write(&shard, bytes).expect("a shard");
        let error = run_line(&["verify", &out]).expect_err("the shard is cut off");
        assert_eq!(error.exit_code(), 3);
    }

    #[test]
    fn an_empty_folder_is_an_error_of_data() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().display().to_string();
        assert_eq!(
            run_line(&["info", &dir])
                .expect_err("nothing there")
                .exit_code(),
            3
        );
    }

    #[test]
    fn flags_of_another_source_are_refused() {
        for flag in [&["--held-out", "0.1"][..], &["--extensions", "txt"]] {
            let line = [
                &["prepare", "--source", "pg19", "--path", "x", "--out", "y"],
                flag,
            ]
            .concat();
            assert_eq!(run_line(&line).expect_err("no effect").exit_code(), 2);
        }
    }

    #[test]
    fn a_path_is_needed_except_for_cargo() {
        let parse = |source: &str| {
            Cli::try_parse_from([
                "mambabyte",
                "data",
                "prepare",
                "--source",
                source,
                "--out",
                "x",
            ])
        };
        assert!(parse("text").is_err());
        assert!(parse("pg19").is_err());
        assert!(parse("cargo").is_ok());
    }
}
