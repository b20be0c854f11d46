//! [`KubeApiServer`]: a real kube-apiserver on a real etcd.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::child::{Folder, Server, free_ports};
use super::etcd::Etcd;
use super::https::{Caller, Reply};
use super::pki::Authority;
use super::version::cache;

/// The environment variable that names a folder with the program, as other projects use it.
const ASSETS: &str = "KUBEBUILDER_ASSETS";

/// The folder in the user's cache to which `cargo xtask setup` builds the program.
const CACHE: &str = "flannel-test/kube-apiserver-1.20-reflect2-1.0.2";

/// The token of an administrator.
const ADMIN: &str = "the-administrators-token";

/// The longest that a server may take to be ready.
const START: Duration = Duration::from_secs(120);

/// A kube-apiserver with an etcd of its own, on the loopback interface. Dropping it ends it, and
/// with the last one on an etcd that too.
///
/// It is known by a certificate of the cluster's own authority ([`ca`](Self::ca)), and permits what
/// RBAC permits. There are no other components: a Node is what a test says it is.
#[derive(Debug)]
pub struct KubeApiServer {
    cluster: Arc<Cluster>,
    port: u16,
    server: Option<Server>,
}

/// What the servers on one etcd share.
#[derive(Debug)]
struct Cluster {
    program: PathBuf,
    /// Whether it is so old that two families have to be asked for.
    is_old: bool,
    etcd: Mutex<Etcd>,
    authority: Authority,
    certificate: (PathBuf, PathBuf),
    signing: (PathBuf, PathBuf),
    caller: Caller,
    // Last, so that it is removed when nothing writes into it any more.
    folder: Folder,
}

impl KubeApiServer {
    /// The program: that of the folder that `KUBEBUILDER_ASSETS` names, else the one that
    /// `cargo xtask setup` built, else `kube-apiserver` in the path; `None` if there is none.
    #[allow(
        clippy::disallowed_methods,
        reason = "tests are told by their environment what to run"
    )]
    pub fn program() -> Option<PathBuf> {
        let folder = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let assets = folder(ASSETS).map(PathBuf::from);
        let path = folder("PATH").unwrap_or_default();
        assets
            .into_iter()
            .chain([cache().join(CACHE)])
            .chain(std::env::split_paths(&path))
            .map(|folder| folder.join("kube-apiserver"))
            .find(|program| program.is_file())
    }

    /// Whether a test that needs one may go on; skips it if there is no program.
    ///
    /// # Panics
    /// As [`require`](crate::require).
    pub fn require(test: &str) -> bool {
        let problem = "there is no kube-apiserver: `cargo xtask setup` builds one, and \
                       KUBEBUILDER_ASSETS names another";
        let missing = Self::program().is_none().then_some(problem);
        crate::require(test, missing) && crate::require_tool(test, "etcd")
    }

    /// Starts one on a new etcd, and waits until it is ready.
    ///
    /// # Errors
    /// There is no such program ([`io::ErrorKind::NotFound`]), or it did not start; its last words
    /// are in the error.
    pub fn start() -> io::Result<Self> {
        let program = Self::program().ok_or_else(|| {
            let problem = "kube-apiserver is not installed: `cargo xtask setup` builds it";
            io::Error::new(io::ErrorKind::NotFound, problem)
        })?;
        let folder = Folder::new("kube")?;
        let authority = Authority::new(&folder.path().join("pki"), "kube")?;
        let tokens = folder.path().join("tokens.csv");
        std::fs::write(&tokens, format!("{ADMIN},admin,admin,\"system:masters\"\n"))?;
        let cluster = Cluster {
            is_old: is_old(&program)?,
            program,
            etcd: Mutex::new(Etcd::start()?),
            certificate: authority.server("kube-apiserver")?,
            signing: authority.signing_key("service-accounts")?,
            caller: Caller::new(authority.ca())?,
            authority,
            folder,
        };
        Self::on(Arc::new(cluster))
    }

    /// Starts another one on the same etcd. Both have the same certificate, tokens and objects.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn beside(other: &Self) -> io::Result<Self> {
        Self::on(Arc::clone(&other.cluster))
    }

    fn on(cluster: Arc<Cluster>) -> io::Result<Self> {
        let mut last = io::Error::other("not tried");
        // A port that was free may be taken when it is used.
        for _ in 0..5 {
            let mut server = Self {
                cluster: Arc::clone(&cluster),
                port: free_ports(1)?.into_iter().next().unwrap_or_default(),
                server: None,
            };
            match server.restart() {
                Ok(()) => return Ok(server),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), self.port)
    }

    /// The URL: `https://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("https://{}", self.address())
    }

    /// The file with the certificate that it is to be trusted by.
    pub fn ca(&self) -> &Path {
        self.cluster.authority.ca()
    }

    /// The authority: clients are known by its certificates, too.
    pub fn authority(&self) -> &Authority {
        &self.cluster.authority
    }

    /// The token of an administrator, who may do everything.
    pub const fn admin_token(&self) -> &'static str {
        ADMIN
    }

    /// A folder beside its data, removed with it.
    pub fn folder(&self) -> &Path {
        self.cluster.folder.path()
    }

    /// The process's id, to look at what it uses; `None` while it does not run.
    pub fn pid(&self) -> Option<u32> {
        self.server.as_ref().map(Server::id)
    }

    /// Starts it again on its etcd, and waits until it is ready.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    #[allow(
        clippy::disallowed_methods,
        reason = "a server takes as long as it takes"
    )]
    pub fn restart(&mut self) -> io::Result<()> {
        self.kill();
        let cluster = &self.cluster;
        let program = cluster.program.to_string_lossy();
        let log = self.folder().join(format!("log-{}", self.port));
        let mut server = Server::start(&program, self.args(), &log)?;
        let begun = std::time::Instant::now();
        loop {
            server.check()?;
            // It makes its namespaces a moment after it says that it is ready.
            let good = |path| matches!(self.get(path), Ok(Reply { status: 200, .. }));
            if good("/readyz") && good("/api/v1/namespaces/default") {
                break;
            }
            if begun.elapsed() > START {
                return Err(io::Error::other("kube-apiserver is not ready"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        self.server = Some(server);
        Ok(())
    }

    fn args(&self) -> Vec<String> {
        let cluster = &self.cluster;
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let etcd = cluster.etcd.lock().unwrap_or_else(PoisonError::into_inner);
        [
            ("etcd-servers", etcd.endpoint()),
            ("bind-address", "127.0.0.1".to_owned()),
            ("advertise-address", "127.0.0.1".to_owned()),
            ("secure-port", self.port.to_string()),
            ("service-cluster-ip-range", "10.96.0.0/16".to_owned()),
            (
                "cert-dir",
                text(&cluster.folder.path().join("certificates")),
            ),
            ("tls-cert-file", text(&cluster.certificate.0)),
            ("tls-private-key-file", text(&cluster.certificate.1)),
            ("client-ca-file", text(cluster.authority.ca())),
            (
                "token-auth-file",
                text(&cluster.folder.path().join("tokens.csv")),
            ),
            ("authorization-mode", "RBAC".to_owned()),
            (
                "service-account-issuer",
                "https://kubernetes.default.svc".to_owned(),
            ),
            ("service-account-signing-key-file", text(&cluster.signing.0)),
            ("service-account-key-file", text(&cluster.signing.1)),
            // Two servers would argue about the endpoints of the service `kubernetes`.
            ("endpoint-reconciler-type", "none".to_owned()),
        ]
        .into_iter()
        .chain(cluster.is_old.then(|| {
            let gate = "IPv6DualStack=true".to_owned();
            ("feature-gates", gate)
        }))
        .map(|(flag, value)| format!("--{flag}={value}"))
        .collect()
    }

    /// Ends it at once, as a power cut does. Its objects stay.
    pub fn kill(&mut self) {
        self.server = None;
    }

    /// Freezes it: its connections stay open, and nothing is answered.
    pub fn freeze(&self) {
        if let Some(server) = &self.server {
            server.signal(Signal::SIGSTOP);
        }
    }

    /// Ends a freeze.
    pub fn thaw(&self) {
        if let Some(server) = &self.server {
            server.signal(Signal::SIGCONT);
        }
    }

    /// One call as the administrator: a method and a path, such as `GET` and `/api/v1/nodes`.
    ///
    /// # Errors
    /// There is no answer. What an answer says is for the caller to judge.
    pub fn call(&self, method: &str, path: &str, kind: &str, body: &str) -> io::Result<Reply> {
        self.call_as(ADMIN, method, path, kind, body)
    }

    /// One call as the one whom a token names.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn call_as(
        &self,
        token: &str,
        method: &str,
        path: &str,
        kind: &str,
        body: &str,
    ) -> io::Result<Reply> {
        let head = format!("{method} {path}");
        let headers = format!("Authorization: Bearer {token}\r\nContent-Type: {kind}\r\n");
        let caller = &self.cluster.caller;
        caller.call(self.address(), &head, &headers, body)
    }

    /// Reads a path.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn get(&self, path: &str) -> io::Result<Reply> {
        self.call("GET", path, "application/json", "")
    }

    /// Reads an object, or nothing if it is not there.
    ///
    /// # Errors
    /// There is no answer, or another one.
    pub fn object(&self, path: &str) -> io::Result<Option<Value>> {
        match self.get(path)? {
            Reply { status: 404, .. } => Ok(None),
            reply => accepted(reply).map(Some),
        }
    }

    /// Makes an object in a collection, such as `/api/v1/nodes`.
    ///
    /// # Errors
    /// There is no answer, or it is a refusal.
    pub fn create(&self, collection: &str, object: &Value) -> io::Result<Value> {
        accepted(self.call("POST", collection, "application/json", &object.to_string())?)
    }

    /// Changes an object by a merge patch.
    ///
    /// # Errors
    /// There is no answer, or it is a refusal.
    pub fn merge(&self, path: &str, patch: &Value) -> io::Result<Value> {
        let kind = "application/merge-patch+json";
        accepted(self.call("PATCH", path, kind, &patch.to_string())?)
    }

    /// Removes an object; one that is not there is no error.
    ///
    /// # Errors
    /// There is no answer, or it is a refusal.
    pub fn delete(&self, path: &str) -> io::Result<()> {
        match self.call("DELETE", path, "application/json", "")? {
            Reply { status: 404, .. } => Ok(()),
            reply => accepted(reply).map(drop),
        }
    }

    /// Makes a Node with these pod CIDRs.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn add_node(&self, name: &str, pod_cidrs: &[&str]) -> io::Result<Value> {
        let mut node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
        if let Some(first) = pod_cidrs.first() {
            node["spec"] = json!({"podCIDR": first, "podCIDRs": pod_cidrs});
        }
        self.create("/api/v1/nodes", &node)
    }

    /// Removes a Node; one that is not there is no error.
    ///
    /// # Errors
    /// As [`delete`](Self::delete).
    pub fn remove_node(&self, name: &str) -> io::Result<()> {
        self.delete(&format!("/api/v1/nodes/{name}"))
    }

    /// A Node as it stands, or nothing.
    ///
    /// # Errors
    /// As [`object`](Self::object).
    pub fn node(&self, name: &str) -> io::Result<Option<Value>> {
        self.object(&format!("/api/v1/nodes/{name}"))
    }

    /// Makes a service account if there is none, and answers a token of it. Removing the account
    /// makes its tokens void.
    ///
    /// # Errors
    /// There is no answer, or it is a refusal.
    pub fn service_account(&self, namespace: &str, name: &str) -> io::Result<String> {
        let folder = format!("/api/v1/namespaces/{namespace}/serviceaccounts");
        let account = json!({"metadata": {"name": name}});
        if self.object(&format!("{folder}/{name}"))?.is_none() {
            self.create(&folder, &account)?;
        }
        let wanted = json!({"spec": {"expirationSeconds": 3600}});
        let answer = self.create(&format!("{folder}/{name}/token"), &wanted)?;
        let token = answer["status"]["token"].as_str().map(str::to_owned);
        token.ok_or_else(|| io::Error::other("there is no token in the answer"))
    }
}

/// Whether a program is of a version before 1.21, which had dual stack as an experiment.
#[allow(clippy::disallowed_methods, reason = "a test asks a program")]
fn is_old(program: &Path) -> io::Result<bool> {
    let answer = std::process::Command::new(program)
        .arg("--version")
        .output()?;
    let answer = String::from_utf8_lossy(&answer.stdout);
    let minor = answer.trim().strip_prefix("Kubernetes v1.");
    let minor = minor.and_then(|rest| rest.split('.').next()?.parse::<u32>().ok());
    Ok(minor.is_some_and(|minor| minor < 21))
}

/// The object of an answer that is none of an error.
fn accepted(reply: Reply) -> io::Result<Value> {
    let Reply { status, body } = reply;
    if (200..300).contains(&status) {
        serde_json::from_str(&body).map_err(io::Error::other)
    } else {
        Err(io::Error::other(format!("{status}: {body}")))
    }
}
