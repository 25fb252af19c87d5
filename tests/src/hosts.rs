//! Hosts of a test on one machine: network namespaces on a bridge.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Some hosts, each with an address of its own; they go when this does.
pub struct Hosts {
    names: Vec<String>,
    /// Keeps namespaces of tests that run beside each other apart.
    prefix: String,
    subnet: u32,
}

impl Hosts {
    /// Makes hosts of these names; `None`, with the reason, where this user or kernel does not let it.
    pub fn make(names: &[&str]) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if !nix::unistd::Uid::effective().is_root() {
            println!("skipped: network namespaces need root");
            return None;
        }
        if Command::new("ip").arg("-V").output().is_err() {
            crate::skip("there is no `ip` (iproute2)");
            return None;
        }
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id();
        let hosts = Hosts {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            prefix: format!("tf{process}n{number}"),
            subnet: (process + 97 * number) % 200 + 20,
        };
        match hosts.build() {
            Ok(()) => Some(hosts),
            Err(error) => {
                println!("skipped: {error}");
                None
            }
        }
    }

    fn build(&self) -> Result<(), String> {
        // The bridge has a namespace of its own: nothing of it touches the machine's network.
        let bridge = self.space("bridge");
        ip(&["netns", "add", &bridge])?;
        inside(&bridge, &["link", "add", "name", "bridge0", "type", "bridge"])?;
        inside(&bridge, &["link", "set", "bridge0", "up"])?;
        for (index, name) in self.names.iter().enumerate() {
            let space = self.space(name);
            let port = format!("p{index}");
            ip(&["netns", "add", &space])?;
            inside(
                &bridge,
                &["link", "add", "name", &port, "type", "veth", "peer", "name", "eth", "netns", &space],
            )?;
            inside(&bridge, &["link", "set", &port, "master", "bridge0", "up"])?;
            inside(&space, &["link", "set", "lo", "up"])?;
            inside(&space, &["addr", "add", &format!("{}/24", self.address(name)), "dev", "eth"])?;
            inside(&space, &["link", "set", "eth", "up"])?;
        }
        Ok(())
    }

    fn space(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    fn index(&self, name: &str) -> usize {
        self.names.iter().position(|known| known == name).unwrap()
    }

    /// Address of a host.
    pub fn address(&self, name: &str) -> String {
        format!("10.77.{}.{}", self.subnet, self.index(name) + 1)
    }

    /// `command`, to be run on a host.
    pub fn command(&self, name: &str, command: Command) -> Command {
        self.spaces().command(name, command)
    }

    /// For who runs programs on them.
    pub fn spaces(&self) -> Spaces {
        Spaces(self.prefix.clone())
    }

    /// Pulls a host's cable: nothing reaches it, and nobody is told.
    pub fn cut(&self, name: &str) {
        let port = format!("p{}", self.index(name));
        inside(&self.space("bridge"), &["link", "set", &port, "nomaster"]).unwrap();
    }

    /// Puts it back.
    pub fn mend(&self, name: &str) {
        let port = format!("p{}", self.index(name));
        inside(&self.space("bridge"), &["link", "set", &port, "master", "bridge0", "up"]).unwrap();
    }
}

/// Runs programs on hosts.
pub struct Spaces(String);

impl Spaces {
    /// `command`, to be run on a host.
    pub fn command(&self, name: &str, command: Command) -> Command {
        let mut inside = Command::new("ip");
        inside
            .args(["netns", "exec", &format!("{}-{name}", self.0)])
            .arg(command.get_program())
            .args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(key, value),
                None => inside.env_remove(key),
            };
        }
        inside
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in self.names.iter().map(String::as_str).chain(["bridge"]) {
            let _ = ip(&["netns", "del", &self.space(name)]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(arguments).output().map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
}

fn inside(space: &str, arguments: &[&str]) -> Result<(), String> {
    ip(&[&["-n", space], arguments].concat())
}
