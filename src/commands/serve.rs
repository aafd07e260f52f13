//! The command `serve`.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::eval::CheckpointArgs;
use super::print;
use crate::error::{Error, Result, print_warning};
use crate::server::{Limits, Loaded, ServerOptions, serve};

/// Arguments of `serve`.
#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    model: CheckpointArgs,
    /// Address to listen on; another than of this machine itself needs --key-file
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    pub port: u16,
    /// Name of the model in requests
    #[arg(long, value_name = "NAME", default_value = "mambabyte")]
    pub name: String,
    /// File with the key that requests have to give as `Authorization: Bearer`
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Bytes of all prompts of a request, times `n`
    #[arg(long, value_name = "BYTES", default_value_t = Limits::default().prompt_bytes, value_parser = super::positive)]
    pub max_prompt_bytes: usize,
    /// Bytes that may be generated for a prompt
    #[arg(long, value_name = "BYTES", default_value_t = Limits::default().new_bytes, value_parser = super::positive)]
    pub max_new_bytes: usize,
    /// Requests at work or waiting; more are answered with 429
    #[arg(long, value_name = "N", default_value_t = Limits::default().queue, value_parser = super::positive)]
    pub queue: usize,
    /// Seconds until an answer has to be complete
    #[arg(long, value_name = "SECONDS", default_value_t = Limits::default().deadline.as_secs(), value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub deadline: u64,
}

/// Runs the command: prints the address of the API, then serves until it is told to end.
pub fn run(args: &ServeArgs) -> Result<()> {
    let options = ServerOptions {
        host: args.host,
        port: args.port,
        name: args.name.clone(),
        key: args.key_file.as_deref().map(key).transpose()?,
        limits: Limits {
            prompt_bytes: args.max_prompt_bytes,
            new_bytes: args.max_new_bytes,
            queue: args.queue,
            deadline: Duration::from_secs(args.deadline),
        },
    };
    if !args.host.is_loopback() && options.key.is_some() {
        print_warning(&format!(
            "{} can be reached from other machines; what is sent there is not encrypted",
            args.host
        ));
    }
    let found = args.model.find()?;
    let load = move || {
        let (model, device, precision) = found.load()?;
        Ok(Loaded {
            model,
            device,
            precision,
        })
    };
    serve(options, load, |address| {
        print(&format!("http://{address}/v1\n"))
    })
}

/// The key in a file: its text without the line's end.
fn key(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path).map_err(Error::unreadable(path))?;
    let key = text.trim_end();
    match key.len() >= 16 && key.bytes().all(|byte| byte.is_ascii_graphic()) {
        true => Ok(key.to_owned()),
        false => Err(Error::Usage {
            message: format!("`{}` is no key", path.display()),
            hint: "a key has at least 16 printable ASCII characters and no spaces, as made by \
                   `openssl rand -hex 32`"
                .to_owned(),
        }),
    }
}
