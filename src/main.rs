//! The `mambabyte` program: reads the command line, runs the command, turns errors into exit codes.

mod allocator;

use std::process::ExitCode;

use clap::Parser;
use mambabyte::commands::{self, Cli};

#[global_allocator]
static ALLOCATOR: allocator::OrEnd = allocator::OrEnd;

fn main() -> ExitCode {
    let cli = Cli::parse();
    commands::start_logging(cli.verbose);
    // The message of a panic is printed by its hook; without this its exit code would be 101, which
    // is none of the documented ones.
    match std::panic::catch_unwind(|| commands::run(&cli)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            error.print();
            ExitCode::from(error.exit_code())
        }
        Err(_) => ExitCode::FAILURE,
    }
}
