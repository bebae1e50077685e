//! The program itself as a process in a network namespace, with a control plane on its loopback.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use mantlet_testkit::{ChildGuard, NetNs, eventually};

use super::control::{Control, Server, serve_on, token};

/// A proxy as root would start it without thinking: it has every capability to give up.
pub struct Program {
    pub net: NetNs,
    pub process: ChildGuard,
    pub directory: tempfile::TempDir,
    server: Option<Server>,
}

impl Program {
    /// Starts `mantlet-proxy proxy ROLE` and waits until its status port answers.
    pub async fn start(role: &str, account: &str, control: Option<Arc<Control>>, more: &[(&str, &str)]) -> Program {
        let net = NetNs::new("pp");
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("token"), token(account)).unwrap();
        if let Some(control) = &control {
            std::fs::write(path("root.pem"), control.ca.root_pem()).unwrap();
        }
        let server = control.map(|control| listen(&net, control));
        let log = std::fs::File::create(path("log")).unwrap();
        let mut command = net.command(env!("CARGO_BIN_EXE_mantlet-proxy"));
        command
            .args(["proxy", role, "--domain", "default.svc.cluster.local"])
            .arg("--log_output_level=default:debug")
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("POD_NAME", format!("{account}-1"))
            .env("SERVICE_ACCOUNT", account)
            .env(
                "PROXY_CONFIG",
                r#"{"discoveryAddress":"localhost:15012","concurrency":1}"#,
            )
            .env("MANTLET_TOKEN_FILE", path("token"))
            .env("XDS_ROOT_CA", path("root.pem"))
            .env("CA_ROOT_CA", path("root.pem"))
            .env("MANTLET_MESH_ROOT", path("root.pem"))
            .envs(more.iter().copied())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .stdin(Stdio::null());
        let program = Program {
            process: ChildGuard::new(command.spawn().unwrap()),
            net,
            directory,
            server,
        };
        eventually("the status port answers", Duration::from_secs(20), || async {
            match program.net.run(|| std::net::TcpStream::connect("127.0.0.1:15021")) {
                Ok(_) => Ok(()),
                Err(error) => Err((error, program.log())),
            }
        })
        .await;
        program
    }

    /// Ends the control plane with all of its streams, and starts it again.
    pub fn restart_control(&mut self, control: Arc<Control>) {
        self.server = None;
        self.server = Some(listen(&self.net, control));
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// A file of `/proc` about the process (`ip netns exec` has become the program by exec).
    pub fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.process.id()))
    }

    /// A line of `/proc/PID/status`.
    pub fn status(&self, field: &str) -> String {
        let text = std::fs::read_to_string(self.proc("status")).unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("{field} in {text}")).trim().to_string()
    }
}

fn listen(net: &NetNs, control: Arc<Control>) -> Server {
    let address = "127.0.0.1:15012".parse().unwrap();
    let listener = net.run(|| mantlet_net::sockopt::listen_tcp(address, Default::default()).unwrap());
    serve_on(control, listener)
}
