//! `coordinator version`: the version of this program and of a coordinator that runs.

use std::io::Write;
use std::process::ExitCode;

use tunefleet_proto::dial::Credentials;
use tunefleet_proto::rpc::{OLDEST_PROTOCOL, PROTOCOL, VersionRequest, VersionResponse};

use crate::cli::exit;
use crate::connect;

/// Command line of `coordinator version`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Asks the coordinator at this address as well.
    #[arg(long, value_name = "URL")]
    coordinator: Option<String>,
    #[command(flatten)]
    credentials: Credentials,
}

/// Runs the verb.
pub fn run(args: Args) -> ExitCode {
    connect::block_on(async {
        let own = line("this program", env!("CARGO_PKG_VERSION"), OLDEST_PROTOCOL, PROTOCOL);
        // A reader that has gone away wants no more.
        let _ = writeln!(std::io::stdout(), "{own}");
        if let Some(coordinator) = args.coordinator {
            let mut client = connect::client(&coordinator, &args.credentials).await?;
            let answer = client.version(VersionRequest {}).await?.into_inner();
            let _ = writeln!(std::io::stdout(), "{}", theirs(&answer));
        }
        Ok(exit::OK)
    })
}

fn line(what: &str, version: &str, oldest: u32, newest: u32) -> String {
    format!("{what}: {version}, protocol {oldest} to {newest}")
}

fn theirs(answer: &VersionResponse) -> String {
    let line = line("coordinator", &answer.version, answer.oldest_protocol, answer.protocol);
    format!("{line}, cluster {}", answer.cluster)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coordinator_is_shown_with_the_protocols_it_understands_and_its_cluster() {
        let cluster = "c1".to_owned();
        let answer =
            VersionResponse { version: "1.2.3".to_owned(), protocol: 4, oldest_protocol: 2, cluster };
        assert_eq!(theirs(&answer), "coordinator: 1.2.3, protocol 2 to 4, cluster c1");
    }
}
