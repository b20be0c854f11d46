//! [`Calls`]: what is asked of the API server.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use flannel_core::Dead;
use http::{Method, Request, StatusCode, header};
use http_body::Body as _;
use kube::client::Body;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::timeout;

use crate::access::Connection;
use crate::failure::{Failure, Refusal};
use crate::node::NodeView;
use crate::options::KubeOptions;
use crate::prefix::AnnotationPrefix;
use crate::split::Splitter;

/// The collection of Nodes.
const NODES: &str = "/api/v1/nodes";

/// The longest answer that is taken as a whole, in bytes; lists are taken in parts.
const LONGEST: usize = 16 << 20;

/// The API server.
pub(crate) struct Calls {
    connection: Connection,
    prefix: AnnotationPrefix,
    limit: Duration,
}

/// A whole answer, and the server's clock.
struct Answer {
    body: Vec<u8>,
    date: Option<String>,
}

/// A Node as it stands, and the server's clock in the form that Kubernetes uses.
pub(crate) struct Found {
    pub(crate) node: NodeView,
    pub(crate) now: Option<String>,
}

impl Calls {
    pub(crate) fn new(options: &KubeOptions) -> Self {
        Self {
            connection: Connection::new(options.access.clone(), options.connect_timeout),
            prefix: options.prefix.clone(),
            limit: options.call_timeout,
        }
    }

    /// Reads a Node from the store itself, not from a cache.
    pub(crate) async fn node(&self, name: &str) -> Result<Found, Failure> {
        let request = request(Method::GET, &format!("{NODES}/{name}"), None, Vec::new());
        self.found(self.whole(request).await?)
    }

    /// Changes a Node's annotations and conditions by a strategic merge patch.
    pub(crate) async fn patch_status(&self, name: &str, patch: &Value) -> Result<Found, Failure> {
        let path = format!("{NODES}/{name}/status");
        let kind = Some("application/strategic-merge-patch+json");
        let body = patch.to_string().into_bytes();
        let answer = self.whole(request(Method::PATCH, &path, kind, body));
        self.found(answer.await?)
    }

    /// Reads a key of a ConfigMap; nothing if either is not there.
    pub(crate) async fn config_map(
        &self,
        namespace: &str,
        name: &str,
        key: &str,
    ) -> Result<Option<String>, Failure> {
        #[derive(Deserialize)]
        struct ConfigMap {
            data: Option<std::collections::BTreeMap<String, String>>,
        }

        let path = format!("/api/v1/namespaces/{namespace}/configmaps/{name}");
        let request = request(Method::GET, &path, None, Vec::new());
        let answer = match self.whole(request).await {
            Err(failure) if failure.code() == 404 => return Ok(None),
            answer => answer?,
        };
        let map: ConfigMap = serde_json::from_slice(&answer.body)
            .map_err(|error| Failure::Strange(error.to_string()))?;
        Ok(map.data.and_then(|mut data| data.remove(key)))
    }

    /// Whether the server answers, whatever it says.
    pub(crate) async fn probe(&self) -> Result<(), Failure> {
        match self
            .whole(request(Method::GET, "/version", None, Vec::new()))
            .await
        {
            Err(Failure::Refused(_)) | Ok(_) => Ok(()),
            Err(failure) => Err(failure),
        }
    }

    /// Begins a list of all Nodes: from the server's cache, if that has come to the version `since`;
    /// without one from the store itself.
    pub(crate) async fn list(&self, since: Option<u64>) -> Result<Parts, Failure> {
        let path = match since {
            // At once, as a server divides only what it reads from the store.
            Some(version) => {
                format!("{NODES}?resourceVersion={version}&resourceVersionMatch=NotOlderThan")
            }
            None => NODES.to_owned(),
        };
        self.parts(&path, Splitter::list()).await
    }

    /// Begins a watch of all Nodes after a version, which the server ends after so many seconds.
    pub(crate) async fn watch(&self, after: u64, seconds: u64) -> Result<Parts, Failure> {
        let path = format!(
            "{NODES}?watch=true&allowWatchBookmarks=true&resourceVersion={after}\
             &timeoutSeconds={seconds}"
        );
        self.parts(&path, Splitter::stream()).await
    }

    pub(crate) fn decode(&self, json: &[u8]) -> Result<NodeView, Failure> {
        NodeView::from_json(json, &self.prefix).map_err(|error| Failure::Strange(error.to_string()))
    }

    /// Drops what is connected.
    pub(crate) fn reconnect(&self) {
        self.connection.reconnect();
    }

    fn found(&self, answer: Answer) -> Result<Found, Failure> {
        Ok(Found {
            node: self.decode(&answer.body)?,
            now: answer.date.as_deref().and_then(timestamp),
        })
    }

    async fn whole(&self, request: Request<Body>) -> Result<Answer, Failure> {
        let answer = async {
            let answer = self.send(request).await?;
            let date = answer.headers().get(header::DATE);
            let date = date.and_then(|date| date.to_str().ok()).map(str::to_owned);
            let body = whole(answer.into_body()).await?;
            Ok(Answer { body, date })
        };
        timeout(self.limit, answer)
            .await
            .unwrap_or_else(|_| Err(Failure::silent(self.limit)))
    }

    async fn parts(&self, path: &str, splitter: Splitter) -> Result<Parts, Failure> {
        let request = request(Method::GET, path, None, Vec::new());
        let dead = self.connection.listen();
        let answer = timeout(self.limit, self.send(request)).await;
        let answer = answer.unwrap_or_else(|_| Err(Failure::silent(self.limit)))?;
        Ok(Parts {
            body: answer.into_body(),
            splitter,
            dead,
        })
    }

    /// Sends a request; an answer is one of success.
    async fn send(&self, request: Request<Body>) -> Result<http::Response<Body>, Failure> {
        let mut dead = self.connection.listen();
        let client = self.connection.client().await?;
        let answer = tokio::select! {
            biased;
            answer = client.send(request) => answer,
            () = dead.told() => return Err(Failure::dead()),
        };
        let answer = answer.map_err(|error| Failure::NoAnswer(shown(&error)))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        if status == StatusCode::UNAUTHORIZED {
            // Perhaps a file was replaced and looks the same.
            self.connection.forget();
        }
        let wait = answer.headers().get(header::RETRY_AFTER);
        let wait = wait.and_then(|wait| wait.to_str().ok()?.parse().ok());
        let body = whole(answer.into_body()).await.unwrap_or_default();
        let mut refusal = Refusal::read(status.as_u16(), &body);
        refusal.retry_after = refusal.retry_after.or(wait.map(Duration::from_secs));
        Err(Failure::Refused(refusal))
    }
}

fn request(method: Method, path: &str, kind: Option<&str>, body: Vec<u8>) -> Request<Body> {
    let mut request = Request::new(Body::from(body));
    *request.method_mut() = method;
    // Paths are made of names that Kubernetes allows; of another one the server knows nothing.
    *request.uri_mut() = path.parse().unwrap_or_default();
    let headers = request.headers_mut();
    let json = header::HeaderValue::from_static("application/json");
    headers.insert(header::ACCEPT, json);
    // A watch is not to wait until there is enough for a block.
    let identity = header::HeaderValue::from_static("identity");
    headers.insert(header::ACCEPT_ENCODING, identity);
    if let Some(kind) = kind.and_then(|kind| kind.parse().ok()) {
        headers.insert(header::CONTENT_TYPE, kind);
    }
    request
}

/// An answer that is taken in parts.
pub(crate) struct Parts {
    body: Body,
    splitter: Splitter,
    dead: Dead,
}

impl Parts {
    /// Waits as [`next`](Self::next), but not for what is connected no more.
    ///
    /// # Cancel safety
    /// Cancel safe: what was taken is answered.
    pub(crate) async fn next_alive(
        &mut self,
        most: usize,
    ) -> Result<Option<Vec<Vec<u8>>>, Failure> {
        let mut dead = self.dead.clone();
        tokio::select! {
            biased;
            next = self.next(most) => next,
            () = dead.told() => Err(Failure::dead()),
        }
    }

    /// Waits for the next bytes, takes whatever else is there already, up to so many objects, and
    /// answers the objects that are whole. `None` at the end.
    ///
    /// # Cancel safety
    /// Cancel safe: what was taken is answered.
    pub(crate) async fn next(&mut self, most: usize) -> Result<Option<Vec<Vec<u8>>>, Failure> {
        let mut objects = Vec::new();
        let mut came = false;
        poll_fn(|cx| {
            while objects.len() < most {
                match Pin::new(&mut self.body).poll_frame(cx) {
                    Poll::Ready(Some(Ok(frame))) => {
                        came = true;
                        let bytes = frame.data_ref().map_or(&[][..], |data| data);
                        let fed = self.splitter.feed(bytes, |object| objects.push(object));
                        if let Err(error) = fed {
                            return Poll::Ready(Err(Failure::Strange(error.to_string())));
                        }
                    }
                    Poll::Ready(Some(Err(error))) if !came => {
                        return Poll::Ready(Err(Failure::NoAnswer(shown(&error))));
                    }
                    Poll::Ready(None) if !came => {
                        return Poll::Ready(if self.splitter.is_complete() {
                            Ok(None)
                        } else {
                            let cut = "the answer was cut off".to_owned();
                            Err(Failure::NoAnswer(cut))
                        });
                    }
                    // What came before is told first; an end or an error is told again.
                    Poll::Pending if !came => return Poll::Pending,
                    Poll::Ready(_) | Poll::Pending => break,
                }
            }
            Poll::Ready(Ok(Some(())))
        })
        .await
        .map(|more| more.map(|()| objects))
    }

    /// Of a list at its end: its version.
    pub(crate) fn version(&self) -> Result<u64, Failure> {
        #[derive(Deserialize)]
        struct List {
            metadata: Meta,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Meta {
            resource_version: String,
            #[serde(default, rename = "continue")]
            more: String,
        }

        let strange = |reason: String| Failure::Strange(reason);
        let list: List = serde_json::from_slice(self.splitter.rest())
            .map_err(|error| strange(error.to_string()))?;
        if !list.metadata.more.is_empty() {
            return Err(strange(
                "a part of the list, which was not asked for".to_owned(),
            ));
        }
        let version = list.metadata.resource_version.parse();
        version.map_err(|_| strange("the list's resourceVersion is no number".to_owned()))
    }
}

/// A body as a whole.
async fn whole(mut body: Body) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        let frame = frame.map_err(|error| Failure::NoAnswer(shown(&error)))?;
        let data = frame.data_ref().map_or(&[][..], |data| data);
        if bytes.len() + data.len() > LONGEST {
            return Err(Failure::Strange(format!("more than {LONGEST} bytes")));
        }
        bytes.extend_from_slice(data);
    }
    Ok(bytes)
}

/// An error of the client and its causes, each once: its own texts repeat their sources.
fn shown(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    text
}

/// A server's date, `Sat, 21 Nov 2026 16:41:08 GMT`, as Kubernetes writes times.
fn timestamp(date: &str) -> Option<String> {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let mut words = date.split_once(", ")?.1.split(' ');
    let (day, month, year, clock) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let month = MONTHS.iter().position(|name| *name == month)? + 1;
    let digits =
        |text: &str, len: usize| text.len() == len && text.bytes().all(|b| b.is_ascii_digit());
    let is_clock = clock.len() == 8 && clock.split(':').all(|part| digits(part, 2));
    (digits(day, 2) && digits(year, 4) && is_clock && words.next() == Some("GMT"))
        .then(|| format!("{year}-{month:02}-{day}T{clock}Z"))
}

#[cfg(test)]
mod tests {
    use super::timestamp;

    #[test]
    fn a_servers_date_becomes_a_time() {
        let good = timestamp("Sat, 07 Nov 2026 16:41:08 GMT");
        assert_eq!(good.as_deref(), Some("2026-11-07T16:41:08Z"));
        for bad in [
            "",
            "Sat, 7 Nov 2026 16:41:08 GMT",
            "Sat, 07 Nov 2026 16:41 GMT",
        ] {
            assert_eq!(timestamp(bad), None, "{bad}");
        }
    }
}
