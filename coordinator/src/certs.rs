//! `coordinator certs`: an authority of one's own, and what it signs, for a first set-up. Teams that have an authority
//! need none of it: any certificate whose names are right will do.

use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Subcommand;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use crate::cli::exit;
use crate::connect::{self, Failure};
use crate::control::{Certificate, Grants, certificates};
use crate::events::time;
use crate::serve::state_dir;

const DAY: Duration = Duration::from_secs(24 * 3600);
/// How long the authority signs.
const AUTHORITY_DAYS: u32 = 3650;
/// A clock that is behind must not find a new certificate in the future.
const BACKDATED: Duration = DAY;
const AUTHORITY_CERT: &str = "ca.pem";
const AUTHORITY_KEY: &str = "ca.key";

/// Command line of `coordinator certs`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Makes an authority, `ca.pem` and `ca.key`. Whoever has the key can sign workers: keep it off the machines.
    Init {
        #[command(flatten)]
        at: At,
    },
    /// Signs a certificate of a coordinator, `server.pem` and `server.key`.
    Server {
        /// Host names and addresses by which it is dialled.
        #[arg(required = true)]
        hosts: Vec<String>,
        #[command(flatten)]
        at: At,
        /// Days until it ends.
        #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
    },
    /// Signs a certificate of a worker, `worker-NAME.pem` and `worker-NAME.key`.
    Worker {
        /// The worker's `--name`.
        name: String,
        #[command(flatten)]
        at: At,
        /// Days until it ends.
        #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
    },
    /// Shows names, end and SHA-256 of certificates.
    Show {
        /// PEM files.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Refuses a certificate from now on, though its signature is right, and ends its session.
    Revoke {
        /// Its PEM file.
        file: PathBuf,
        /// State directory of the coordinator; default: as for `coordinator serve`.
        #[arg(long, value_name = "DIR", env = "TUNEFLEET_STATE")]
        state: Option<PathBuf>,
    },
}

#[derive(Debug, clap::Args)]
struct At {
    /// Where the files are.
    #[arg(long, value_name = "DIR", default_value = "certs")]
    dir: PathBuf,
}

/// Runs the verb.
pub fn run(args: Args) -> ExitCode {
    connect::block_on(async { act(args.what) })
}

fn act(what: What) -> Result<u8, Failure> {
    match what {
        What::Init { at } => init(&at.dir)?,
        What::Server { hosts, at, days } => {
            sign(&at.dir, "server", hosts, ExtendedKeyUsagePurpose::ServerAuth, days)?
        }
        What::Worker { name, at, days } => {
            let stem = format!("worker-{name}");
            sign(&at.dir, &stem, vec![name], ExtendedKeyUsagePurpose::ClientAuth, days)?;
        }
        What::Show { files } => return show(&files),
        What::Revoke { file, state } => {
            let state = state_dir(state)?;
            let (_, certificate) = leaf(&file)?;
            Grants::revoke_certificate(&state, certificate.sha256)?;
        }
    }
    Ok(exit::OK)
}

fn failed(error: &dyn std::fmt::Display) -> Failure {
    Failure::new(exit::FAILED, error.to_string())
}

/// Parameters of a certificate with this subject, for so many days.
fn parameters(names: Vec<String>, subject: &str, days: u32) -> Result<CertificateParams, Failure> {
    let bad = |error| Failure::new(exit::USAGE, format!("{subject}: {error}"));
    let mut parameters = CertificateParams::new(names).map_err(bad)?;
    parameters.distinguished_name.push(DnType::CommonName, subject);
    let now = SystemTime::now();
    parameters.not_before = (now - BACKDATED).into();
    parameters.not_after = (now + DAY * days).into();
    Ok(parameters)
}

fn init(dir: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(dir).map_err(|error| failed(&format!("{}: {error}", dir.display())))?;
    let mut parameters = parameters(Vec::new(), "Tunefleet authority", AUTHORITY_DAYS)?;
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().map_err(|error| failed(&error))?;
    let certificate = parameters.self_signed(&key).map_err(|error| failed(&error))?;
    // A new authority would make all that the former has signed worthless.
    write(&dir.join(AUTHORITY_KEY), &key.serialize_pem(), 0o600, Existing::Refused)?;
    write(&dir.join(AUTHORITY_CERT), &certificate.pem(), 0o644, Existing::Refused)?;
    eprintln!("next: coordinator certs server HOST --dir {}", dir.display());
    Ok(())
}

fn sign(
    dir: &Path,
    stem: &str,
    names: Vec<String>,
    purpose: ExtendedKeyUsagePurpose,
    days: u32,
) -> Result<(), Failure> {
    if names.iter().any(|name| name.parse::<IpAddr>().is_err() && !is_host_name(name)) {
        let message = format!("{}: letters, digits, '-', '_' and '.', at most 253", names.join(" "));
        return Err(Failure::new(exit::USAGE, message));
    }
    let read = |name: &str| {
        let path = dir.join(name);
        std::fs::read_to_string(&path).map_err(|error| {
            failed(&format!("{}: {error}: make an authority by `coordinator certs init`", path.display()))
        })
    };
    let authority_key = KeyPair::from_pem(&read(AUTHORITY_KEY)?).map_err(|error| failed(&error))?;
    let authority_pem = read(AUTHORITY_CERT)?;
    let issuer = Issuer::from_ca_cert_pem(&authority_pem, authority_key).map_err(|error| failed(&error))?;
    let subject = names.first().cloned().unwrap_or_default();
    let mut parameters = parameters(names, &subject, days)?;
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages = vec![purpose];
    parameters.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().map_err(|error| failed(&error))?;
    let certificate = parameters.signed_by(&key, &issuer).map_err(|error| failed(&error))?;
    write(&dir.join(format!("{stem}.key")), &key.serialize_pem(), 0o600, Existing::Replaced)?;
    write(&dir.join(format!("{stem}.pem")), &certificate.pem(), 0o644, Existing::Replaced)
}

fn is_host_name(name: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !name.is_empty() && name.len() <= 253 && name.bytes().all(legal) && !name.starts_with('.')
}

/// What becomes of a file that is there.
#[derive(PartialEq, Eq)]
enum Existing {
    Refused,
    Replaced,
}

/// Writes a file whole or not at all, so that a coordinator that follows it never sees half of it.
fn write(path: &Path, text: &str, mode: u32, existing: Existing) -> Result<(), Failure> {
    let at = |error: std::io::Error| failed(&format!("{}: {error}", path.display()));
    if existing == Existing::Refused && path.exists() {
        return Err(failed(&format!("{} is there: it is not replaced", path.display())));
    }
    let mut new = path.to_owned().into_os_string();
    new.push(".new");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&new)
        .map_err(at)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(at)?;
    std::fs::rename(&new, path).map_err(at)?;
    eprintln!("wrote {}", path.display());
    Ok(())
}

fn leaf(path: &Path) -> Result<(usize, Certificate), Failure> {
    let chain = certificates(path).map_err(|error| failed(&error))?;
    let first = chain.first().ok_or_else(|| failed(&format!("{}: no certificate", path.display())))?;
    let read = Certificate::read(first).map_err(|error| failed(&format!("{}: {error}", path.display())))?;
    Ok((chain.len(), read))
}

fn show(files: &[PathBuf]) -> Result<u8, Failure> {
    let mut out = std::io::stdout().lock();
    let mut code = exit::OK;
    for file in files {
        let (count, Certificate { names, sha256, ends }) = leaf(file)?;
        let unix_ms = ends.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let state = if ends < SystemTime::now() { "ended" } else { "ends" };
        if ends < SystemTime::now() {
            code = exit::FAILED;
        }
        let names = if names.is_empty() { "an authority".to_owned() } else { names.join(", ") };
        let more = if count > 1 { format!(", {} more in the file", count - 1) } else { String::new() };
        // A reader that has gone away wants no more.
        let _ =
            writeln!(out, "{}: {names}, {state} {}, sha256 {sha256}{more}", file.display(), time(unix_ms));
    }
    Ok(code)
}
