//! From the command line to a gateway that serves, and back.
//!
//! Everything that needs rights, such as binding ports and reading files of
//! others, comes first; then the process locks itself in; only then are there
//! threads, and only then is a stranger's byte read.

mod prepare;
mod run;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

pub use self::run::check_nat_range;
use crate::config::Config;

/// The unprivileged front end of RVPN: TLS, login, sessions, metering.
#[derive(Debug, Parser)]
#[command(name = "rvpn-gateway", version)]
struct Arguments {
    /// The configuration file.
    #[arg(
        long,
        value_name = "FILE",
        env = "RVPN_CONFIG",
        default_value = "/etc/rvpn/gateway.toml"
    )]
    config: PathBuf,

    /// Check the configuration and the files it names, then exit.
    #[arg(long)]
    check: bool,

    /// Something else than serving.
    #[command(subcommand)]
    task: Option<Task>,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Configurations.
    #[command(subcommand)]
    Config(ConfigTask),
}

#[derive(Debug, Subcommand)]
enum ConfigTask {
    /// Print the configuration of a go-rvpn-server (YAML) as one of ours.
    Import {
        /// Its file.
        file: PathBuf,
    },
}

/// Why the gateway did not start or ended badly, by exit code.
#[derive(Debug)]
pub enum Failure {
    /// 78: the configuration, or a file it names.
    Config(anyhow::Error),
    /// 69: something that must be there is not: the helper, an address.
    Unavailable(anyhow::Error),
    /// 70: anything else.
    Internal(anyhow::Error),
}

impl Failure {
    fn code(&self) -> u8 {
        match self {
            Failure::Config(_) => 78,
            Failure::Unavailable(_) => 69,
            Failure::Internal(_) => 70,
        }
    }

    fn error(&self) -> &anyhow::Error {
        match self {
            Failure::Config(e) | Failure::Unavailable(e) | Failure::Internal(e) => e,
        }
    }
}

/// The whole program.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Printing fails only when nobody reads it.
            drop(error.print());
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => ExitCode::from(1),
            };
        }
    };
    let done = match (&arguments.task, arguments.check) {
        (Some(Task::Config(ConfigTask::Import { file })), _) => import(file),
        (None, true) => check(&arguments.config),
        (None, false) => prepare::prepare(&arguments.config).and_then(run::run),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("rvpn-gateway: {:#}", failure.error());
            ExitCode::from(failure.code())
        }
    }
}

fn load(path: &Path) -> Result<Config, Failure> {
    Config::load(path, |name| std::env::var(name).ok()).map_err(|e| Failure::Config(e.into()))
}

/// Says another program's configuration in our words, on standard output.
fn import(path: &Path) -> Result<(), Failure> {
    let wrong = |e: &dyn std::fmt::Display| {
        Failure::Config(anyhow::anyhow!("cannot import {}: {e}", path.display()))
    };
    let text = std::fs::read_to_string(path).map_err(|e| wrong(&e))?;
    let out = crate::config::import::import(&text, path).map_err(|e| wrong(&e))?;
    print!("{out}");
    Ok(())
}

/// What starting would find out about the configuration, without starting.
fn check(path: &Path) -> Result<(), Failure> {
    let config = load(path)?;
    prepare::log_filter(&config)?;
    let bad = |e: anyhow::Error| Failure::Config(e);
    crate::auth::Gate::prepare(&config).map_err(|e| bad(e.into()))?;
    crate::tls::Tls::check(&config).map_err(|e| bad(e.into()))?;
    println!("{}: the configuration is in order", path.display());
    Ok(())
}
