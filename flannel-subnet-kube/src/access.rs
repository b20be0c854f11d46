//! [`Access`]: the way to the API server, and files that are read again when they change.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use flannel_core::{Dead, Reconnect};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::json;

use crate::failure::Failure;
use crate::options::OptionsError;

/// The way to the API server: where it is, whom it is trusted by, and who we are to it.
///
/// Files are looked at before each call and read again when they have changed: certificates and
/// tokens are replaced without a restart.
#[derive(Clone)]
pub struct Access(Way);

#[derive(Clone)]
enum Way {
    Kubeconfig {
        path: PathBuf,
        context: Option<String>,
    },
    Server {
        url: String,
        ca: PathBuf,
        who: Who,
    },
    Client(Client),
}

#[derive(Debug, Clone)]
enum Who {
    Token(PathBuf),
    Certificate { certificate: PathBuf, key: PathBuf },
}

impl Access {
    /// As a kubeconfig file says, in its current context or in the named one. The files that it
    /// names are watched with it. Programs that it names for authentication (`exec`) are run.
    pub fn kubeconfig(path: impl Into<PathBuf>, context: Option<&str>) -> Self {
        Self(Way::Kubeconfig {
            path: path.into(),
            context: context.map(str::to_owned),
        })
    }

    /// An API server at `https://HOST:PORT`, trusted by the authority in a file, with the token in
    /// another: in a Pod, the two files below `/var/run/secrets/kubernetes.io/serviceaccount`.
    pub fn token(
        url: impl Into<String>,
        ca: impl Into<PathBuf>,
        token: impl Into<PathBuf>,
    ) -> Self {
        Self(Way::Server {
            url: url.into(),
            ca: ca.into(),
            who: Who::Token(token.into()),
        })
    }

    /// An API server at `https://HOST:PORT`, trusted by the authority in a file, with a client's
    /// certificate and its key.
    pub fn certificate(
        url: impl Into<String>,
        ca: impl Into<PathBuf>,
        certificate: impl Into<PathBuf>,
        key: impl Into<PathBuf>,
    ) -> Self {
        Self(Way::Server {
            url: url.into(),
            ca: ca.into(),
            who: Who::Certificate {
                certificate: certificate.into(),
                key: key.into(),
            },
        })
    }

    /// A client that the host program has made itself; how it authenticates is its own affair.
    pub fn client(client: Client) -> Self {
        Self(Way::Client(client))
    }

    pub(crate) fn check(&self) -> Result<(), OptionsError> {
        let Way::Server { url, .. } = &self.0 else {
            return Ok(());
        };
        let refuse = |reason: &str| {
            Err(OptionsError::Server {
                url: url.clone(),
                reason: reason.to_owned(),
            })
        };
        match url.parse::<http::Uri>() {
            Err(error) => refuse(&error.to_string()),
            Ok(uri) if uri.scheme_str() != Some("https") => {
                refuse("must begin with https://, as whoever sees a token can use it")
            }
            Ok(uri) if uri.authority().is_none_or(|it| it.as_str().contains('@')) => {
                refuse("must be a host and a port, without a user")
            }
            Ok(_) => Ok(()),
        }
    }

    /// A text by which ways are told apart.
    pub(crate) fn name(&self) -> String {
        match &self.0 {
            Way::Kubeconfig { path, .. } => path.display().to_string(),
            Way::Server { url, .. } => url.clone(),
            Way::Client(_) => "a client".to_owned(),
        }
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Way::Kubeconfig { path, context } => f
                .debug_struct("Kubeconfig")
                .field("path", path)
                .field("context", context)
                .finish(),
            Way::Server { url, ca, who } => f
                .debug_struct("Server")
                .field("url", url)
                .field("ca", ca)
                .field("who", who)
                .finish(),
            Way::Client(_) => f.write_str("Client"),
        }
    }
}

/// A client of the API server that follows its files.
pub(crate) struct Connection {
    access: Access,
    connect_timeout: Duration,
    current: Mutex<Option<Current>>,
    reconnect: Reconnect,
}

struct Current {
    client: Client,
    files: Vec<Fingerprint>,
}

/// A file as it was when it was read.
#[derive(PartialEq, Eq)]
struct Fingerprint {
    path: PathBuf,
    seen: Option<(SystemTime, u64)>,
}

impl Fingerprint {
    fn of(path: &Path) -> Self {
        // A file that is replaced by a rename has another time, as has the target of a link.
        let seen = std::fs::metadata(path)
            .ok()
            .and_then(|data| Some((data.modified().ok()?, data.len())));
        Self {
            path: path.to_owned(),
            seen,
        }
    }
}

impl Connection {
    pub(crate) fn new(access: Access, connect_timeout: Duration) -> Self {
        Self {
            access,
            connect_timeout,
            current: Mutex::new(None),
            reconnect: Reconnect::default(),
        }
    }

    /// Forgets what was read: the server does not know us by it.
    pub(crate) fn forget(&self) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Drops what is connected: the host has lost an address that it may be bound to. A client that
    /// the host program has made is its own affair.
    pub(crate) fn reconnect(&self) {
        self.forget();
        self.reconnect.tell();
    }

    /// Hears that what is connected is dead.
    pub(crate) fn listen(&self) -> Dead {
        self.reconnect.listen()
    }

    /// The client, made anew if a file has changed since.
    pub(crate) async fn client(&self) -> Result<Client, Failure> {
        if let Way::Client(client) = &self.access.0 {
            return Ok(client.clone());
        }
        {
            let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(current) = &*current
                && current
                    .files
                    .iter()
                    .all(|file| *file == Fingerprint::of(&file.path))
            {
                return Ok(current.client.clone());
            }
        }
        let (mut config, files) = self.config().await?;
        config.connect_timeout = Some(self.connect_timeout);
        // Deadlines and tries are ours.
        config.default_retry = false;
        let client = Client::try_from(config).map_err(|error| Failure::setup(&error))?;
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        *current = Some(Current {
            client: client.clone(),
            files,
        });
        Ok(client)
    }

    /// The settings for a client, and the files that they are from, seen before they were read.
    async fn config(&self) -> Result<(Config, Vec<Fingerprint>), Failure> {
        match &self.access.0 {
            Way::Client(_) => Err(Failure::Setup("there is no file to read".to_owned())),
            Way::Kubeconfig { path, context } => {
                let file = Fingerprint::of(path);
                let read = Kubeconfig::read_from(path).map_err(|error| Failure::setup(&error))?;
                let (config, mut files) = load(read, context.clone()).await?;
                files.push(file);
                Ok((config, files))
            }
            Way::Server { url, ca, who } => {
                let user = match who {
                    Who::Token(token) => json!({ "tokenFile": token }),
                    Who::Certificate { certificate, key } => {
                        json!({ "client-certificate": certificate, "client-key": key })
                    }
                };
                let read = serde_json::from_value(json!({
                    "current-context": "only",
                    "contexts": [
                        {"name": "only", "context": {"cluster": "only", "user": "only"}}
                    ],
                    "clusters": [
                        {"name": "only", "cluster": {"server": url, "certificate-authority": ca}}
                    ],
                    "users": [{"name": "only", "user": user}],
                }));
                load(read.map_err(|error| Failure::setup(&error))?, None).await
            }
        }
    }
}

/// Reads the files that a kubeconfig names, each seen before it was read.
async fn load(
    read: Kubeconfig,
    context: Option<String>,
) -> Result<(Config, Vec<Fingerprint>), Failure> {
    let users = read
        .auth_infos
        .iter()
        .filter_map(|one| one.auth_info.as_ref());
    let of_users =
        users.flat_map(|user| [&user.token_file, &user.client_certificate, &user.client_key]);
    let clusters = read.clusters.iter().filter_map(|one| one.cluster.as_ref());
    let of_clusters = clusters.map(|cluster| &cluster.certificate_authority);
    let named = of_users.chain(of_clusters).flatten();
    let files = named.map(|path| Fingerprint::of(Path::new(path))).collect();
    let options = KubeConfigOptions {
        context,
        ..KubeConfigOptions::default()
    };
    let config = Config::from_custom_kubeconfig(read, &options).await;
    let mut config = config.map_err(|error| Failure::setup(&error))?;
    // Read for this client once, like everything else.
    if let Some(path) = config.auth_info.token_file.take() {
        config.auth_info.token = Some(text(Path::new(&path))?.into());
    }
    Ok((config, files))
}

/// What a small file holds, without the line's end.
fn text(path: &Path) -> Result<String, Failure> {
    let text = std::fs::read_to_string(path);
    let text = text.map_err(|error| Failure::Setup(format!("{}: {error}", path.display())))?;
    match text.trim() {
        "" => Err(Failure::Setup(format!("{} is empty", path.display()))),
        text => Ok(text.to_owned()),
    }
}
