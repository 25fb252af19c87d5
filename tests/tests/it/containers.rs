//! The container files, built by buildah over a small Debian, and run as the user that they name.

use std::path::Path;
use std::process::{Command, Output};

use tunefleet_tests::job::Job;
use tunefleet_tests::programs::root;
use tunefleet_tests::skip;

use super::packages::{can_install, debian_root, on_path, packages};

/// buildah with a store of its own.
struct Buildah<'a> {
    store: &'a Path,
}

impl Buildah<'_> {
    fn try_run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new("buildah");
        command.arg("--root").arg(self.store.join("root")).arg("--runroot").arg(self.store.join("run"));
        command.args(["--storage-driver", "overlay"]).args(arguments).env("BUILDAH_ISOLATION", "chroot");
        command.current_dir(self.store).output().unwrap()
    }

    fn run(&self, arguments: &[&str]) -> String {
        let out = self.try_run(arguments);
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success(), "{arguments:?}: {said}{}", String::from_utf8_lossy(&out.stderr));
        said.trim().to_owned()
    }
}

#[test]
fn images_build_from_the_packages_and_run_as_nobody_in_particular() {
    let torch = root().join(".libtorch").canonicalize().ok().and_then(|dir| Some(dir.parent()?.to_owned()));
    let Some(torch) = torch else { return skip("no .libtorch: make setup") };
    if !can_install() {
        return;
    }
    if !on_path("buildah") {
        return skip("no buildah: apt-get install -y buildah");
    }
    let job = Job::builder().build();
    let (context, store) = (job.dir().join("context"), job.dir().join("store"));
    std::fs::create_dir(&context).unwrap();
    std::fs::create_dir(&store).unwrap();
    for (path, package) in packages(job.dir(), 1).iter().zip(["coordinator", "worker"]) {
        std::fs::rename(path, context.join(format!("tunefleet-{package}_0.1.0-1_amd64.deb"))).unwrap();
    }
    let buildah = Buildah { store: &store };
    let scratch = buildah.run(&["from", "scratch"]);
    buildah.run(&["copy", "--quiet", &scratch, debian_root().to_str().unwrap(), "/"]);
    buildah.run(&["commit", "--quiet", "--rm", &scratch, "localhost/base"]);

    for (package, arguments) in [("coordinator", &["--version"][..]), ("worker", &["--version"])] {
        let file = root().join(format!("deploy/containers/{package}.Containerfile"));
        buildah.run(&[
            "build",
            "--quiet",
            "--isolation",
            "chroot",
            "--build-arg",
            "BASE=localhost/base",
            "--file",
            file.to_str().unwrap(),
            "--tag",
            package,
            context.to_str().unwrap(),
        ]);
        let container = buildah.run(&["from", &format!("localhost/{package}")]);
        let volume = format!("{}:/opt/tunefleet:ro", torch.display());
        let program = format!("/usr/bin/{package}");
        let run = [&["run", "--volume", &volume, &container, "--", &program], arguments].concat();
        let said = buildah.run(&run);
        assert!(said.starts_with(&format!("{package} 0.1.0")), "{said}");
        assert_eq!(buildah.run(&["run", &container, "--", "id", "-u"]), "10001");
        let written = buildah.try_run(&["run", &container, "--", "touch", "/usr/bin/here"]);
        assert!(!written.status.success(), "it may write to its programs");
        let configured = buildah.run(&[
            "inspect",
            "--type",
            "image",
            "--format",
            "{{.OCIv1.Config.User}} {{.OCIv1.Config.Entrypoint}}",
            package,
        ]);
        assert_eq!(configured, format!("10001:10001 [{program}]"));
    }
    let said = buildah.try_run(&[
        "run",
        &buildah.run(&["from", "localhost/worker"]),
        "--",
        "/usr/bin/worker",
        "--version",
    ]);
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("LIBTORCH=/opt/tunefleet/torch holds no lib/libtorch_cpu.so"), "{said}");
}
