//! A push over TLS goes to a hub whose certificate is trusted, and to no other.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use openssl::asn1::Asn1Time;
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::ssl::{SslAcceptor, SslMethod};
use openssl::x509::extension::{BasicConstraints, SubjectAlternativeName};
use openssl::x509::{X509, X509NameBuilder};

/// A certificate for 127.0.0.1 that vouches for itself.
fn certificate() -> (PKey<Private>, X509) {
    let key = PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap();
    let mut name = X509NameBuilder::new().unwrap();
    name.append_entry_by_text("CN", "hub of a test").unwrap();
    let name = name.build();
    let mut builder = X509::builder().unwrap();
    builder.set_version(2).unwrap();
    builder.set_subject_name(&name).unwrap();
    builder.set_issuer_name(&name).unwrap();
    builder.set_pubkey(&key).unwrap();
    builder.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
    builder.set_not_after(&Asn1Time::days_from_now(1).unwrap()).unwrap();
    builder.append_extension(BasicConstraints::new().critical().ca().build().unwrap()).unwrap();
    let address = SubjectAlternativeName::new().ip("127.0.0.1").build(&builder.x509v3_context(None, None));
    builder.append_extension(address.unwrap()).unwrap();
    builder.sign(&key, MessageDigest::sha256()).unwrap();
    (key, builder.build())
}

/// Says to every request who may not come in; the address, the certificate's file and the count of requests.
fn closed_hub(dir: &Path) -> (String, PathBuf, Arc<AtomicUsize>) {
    let (key, certificate) = certificate();
    let file = dir.join("certificate.pem");
    std::fs::write(&file, certificate.to_pem().unwrap()).unwrap();
    let mut acceptor = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls()).unwrap();
    acceptor.set_private_key(&key).unwrap();
    acceptor.set_certificate(&certificate).unwrap();
    let acceptor = acceptor.build();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let requests = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&requests);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = acceptor.accept(stream.unwrap()) else { continue };
            let mut head = [0; 4096];
            if stream.read(&mut head).is_ok_and(|bytes| bytes > 0) {
                count.fetch_add(1, Ordering::SeqCst);
                let answer =
                    "HTTP/1.1 401 Unauthorized\r\ncontent-length: 10\r\nconnection: close\r\n\r\nwho is it?";
                let _ = stream.write_all(answer.as_bytes());
                let _ = stream.shutdown();
            }
        }
    });
    (url, file, requests)
}

#[test]
fn the_token_is_sent_over_tls_to_a_trusted_hub_alone() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("export");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("config.json"), "{}").unwrap();
    let (url, certificate, requests) = closed_hub(dir.path());
    let push = |trusted: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_worker"));
        command.arg("export").arg("--out").arg(&out).args(["--push", "team/model", "--endpoint", &url]);
        command.env("HF_TOKEN", "hf_of_a_test").env("NO_PROXY", "127.0.0.1").env("SSL_CERT_FILE", trusted);
        let output = command.env_remove("SSL_CERT_DIR").output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };

    let nothing = dir.path().join("nothing.pem");
    std::fs::write(&nothing, "").unwrap();
    let message = push(&nothing);
    assert!(message.contains("certificate") && message.contains("SSL_CERT_FILE"), "{message}");
    assert_eq!(requests.load(Ordering::SeqCst), 0);

    let message = push(&certificate);
    assert!(message.contains("401: who is it?"), "{message}");
    // To make the repository, and then to see whether it is there.
    assert_eq!(requests.load(Ordering::SeqCst), 2);
}
