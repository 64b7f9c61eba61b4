//! `rvpn`: the client, and the operators' tool.

mod ahead;
mod cli;
mod doctor;
mod echo;
mod fail;
mod home;
mod http;
mod join;
mod link;
mod op;
mod ping;
mod profile;
mod reach;
mod serve;
mod text;
mod tls;
mod up;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};
use crate::fail::{Failure, Outcome};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors; wrong usage has a status of its own.
            let _closed = error.print();
            let pings = std::env::args_os().nth(1).is_some_and(|w| w == "ping");
            return ExitCode::from(match (error.use_stderr(), pings) {
                (false, _) => 0,
                (true, false) => 1,
                // As ping does: 1 means that nobody answered.
                (true, true) => 2,
            });
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return report(&Failure::internal(format!("cannot start: {error}"))),
    };
    if let Command::Ping(args) = cli.command {
        return runtime.block_on(ping::run(args));
    }
    if let Command::Serve(args) = cli.command {
        let served = runtime.block_on(serve::run(*args));
        // What its visitors are doing is over.
        runtime.shutdown_background();
        return match served {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => report(&failure),
        };
    }
    match runtime.block_on(run(cli.command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&failure),
    }
}

async fn run(command: Command) -> Outcome {
    match command {
        Command::Join(args) => join::run(args).await,
        Command::Token(what) => op::token::run(what).await,
        Command::Invite(args) => op::invite::run(args).await,
        Command::Listener(what) => op::listener::run(what).await,
        Command::Session(what) => op::session::run(what).await,
        Command::Usage(args) => op::session::usage(args).await,
        Command::Certificate(what) => op::certificate::run(what).await,
        Command::Up(args) => up::run(args).await,
        Command::Down(args) => up::down(args).await,
        Command::Status(args) => up::status(args).await,
        Command::Doctor(args) => doctor::run(args).await,
        Command::Carry => up::carry::run().await,
        Command::Mend => up::mend::run().await,
        // These have statuses or a runtime of their own, and were taken care of above.
        Command::Ping(_) | Command::Serve(_) => Ok(()),
    }
}

fn report(failure: &Failure) -> ExitCode {
    eprintln!("rvpn: {failure}");
    failure.exit()
}
