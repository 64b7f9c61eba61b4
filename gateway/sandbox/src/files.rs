//! Landlock: the paths that remain.
//!
//! Rights are bound to the file a path names now. A file that is replaced by
//! renaming another over it is a new file without rights, so whatever is renewed
//! that way (certificates, the resolver's file) is granted by its directory.

use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, PathBeneath,
    PathFd, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};

use crate::{Error, Policy, step};

/// Without these rights refused there is no cage: Linux 5.13.
const NEEDED: ABI = ABI::V1;
/// Refused as well where the kernel can: truncation, device ioctls, signals and
/// abstract sockets of others.
const WANTED: ABI = ABI::V7;

/// True when everything wanted is enforced, false when only what is needed.
pub(crate) fn confine(policy: &Policy) -> Result<bool, Error> {
    let landlock = step::<landlock::RulesetError>;
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(NEEDED))
        .map_err(|_| Error::Landlock)?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(WANTED))
        .and_then(|r| r.scope(Scope::from_all(WANTED)))
        .map_err(landlock("landlock"))?;
    for (ports, access) in ports(policy) {
        if ports.is_some() {
            ruleset = ruleset
                .handle_access(access)
                .map_err(landlock("landlock"))?;
        }
    }
    let mut ruleset = ruleset.create().map_err(landlock("landlock"))?;

    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = read
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::RemoveFile
        | AccessFs::MakeSock;
    // A process looks at its own threads to prove that it is caged.
    let own = [PathBuf::from("/proc/self")];
    for (paths, access) in [
        (&policy.read[..], read),
        (&policy.write[..], write),
        (&policy.sockets[..], read),
        (&own[..], read),
    ] {
        for path in paths.iter().filter(|p| p.exists()) {
            ruleset = grant(ruleset, path, access)?;
        }
    }
    for (ports, access) in ports(policy) {
        for port in ports.iter().flatten() {
            ruleset = ruleset
                .add_rule(NetPort::new(*port, access))
                .map_err(landlock("landlock"))?;
        }
    }
    let status = ruleset.restrict_self().map_err(landlock("landlock"))?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => Ok(true),
        RulesetStatus::PartiallyEnforced => Ok(false),
        RulesetStatus::NotEnforced => Err(Error::Landlock),
    }
}

fn ports(policy: &Policy) -> [(&Option<Vec<u16>>, AccessNet); 2] {
    [
        (&policy.tcp_bind, AccessNet::BindTcp),
        (&policy.tcp_connect, AccessNet::ConnectTcp),
    ]
}

fn grant(
    ruleset: RulesetCreated,
    path: &PathBuf,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, Error> {
    let fd = PathFd::new(path).map_err(step("landlock"))?;
    // Rights over directories are refused for a plain file.
    let access = if path.is_dir() {
        access
    } else {
        access & AccessFs::from_file(WANTED)
    };
    ruleset
        .add_rule(PathBeneath::new(fd, access))
        .map_err(step("landlock"))
}
