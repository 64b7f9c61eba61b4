//! The gateway's program; what it does is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    rvpn_gateway::lifecycle::main()
}
