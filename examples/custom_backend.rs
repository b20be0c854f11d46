//! A backend written against the public API alone: peers on a common link, reached by plain routes
//! through their public addresses. It runs the conformance suite of backends on itself.
//!
//! `cargo run --example custom_backend`

#![allow(
    clippy::disallowed_methods,
    clippy::exit,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a program for the terminal"
)]

use std::process::ExitCode;
use std::sync::Arc;

use async_trait::async_trait;
use flannel::backend::Result;
use flannel::{
    Backend, BackendType, DualStack, Lease, LeaseAttrs, MAIN_TABLE, Network, NodeContext, Object,
    Reach, Rejection, Route, RouteProtocol, RouteTarget, Subnet, Underlay,
};
use flannel_testkit::conformance::backend::{Input, all};

/// Plain routes: nothing is published, and nothing is built but routes.
#[derive(Debug)]
struct Plain;

#[async_trait]
impl Backend for Plain {
    fn backend_type(&self) -> BackendType {
        BackendType::new("plain").unwrap_or_else(|_| BackendType::host_gw())
    }

    fn attrs<'a>(&self, cx: &NodeContext<'a>) -> Result<LeaseAttrs> {
        let public_ip = cx.external.public;
        let backend_type = Some(self.backend_type());
        Ok(LeaseAttrs {
            public_ip,
            backend_type,
            ..LeaseAttrs::default()
        })
    }

    async fn register_network<'a>(
        &self,
        cx: &NodeContext<'a>,
        lease: Lease,
    ) -> Result<Arc<dyn Network>> {
        let underlay = Arc::clone(cx.underlay);
        Ok(Arc::new(PlainNetwork {
            lease,
            underlay,
            mtu: cx.external.mtu,
        }))
    }
}

#[derive(Debug)]
struct PlainNetwork {
    lease: Lease,
    underlay: Arc<Underlay>,
    mtu: u32,
}

#[async_trait]
impl Network for PlainNetwork {
    fn lease(&self) -> &Lease {
        &self.lease
    }

    fn mtu(&self) -> u32 {
        self.mtu // nothing is added to a packet
    }

    fn local(&self) -> Vec<Object> {
        Vec::new() // and no device is needed
    }

    fn peer(
        &self,
        peer: &Lease,
        subnets: &DualStack<Subnet>,
    ) -> DualStack<std::result::Result<Vec<Object>, Rejection>> {
        subnets.map(|family, subnet| {
            let public = |reason: &str| Rejection::PublicIp {
                found: format!("{:?}", peer.attrs.public_ip(family)),
                reason: reason.to_owned(),
            };
            let gateway = peer
                .attrs
                .public_ip(family)
                .ok_or_else(|| public("it is missing"))?;
            let Reach::OnLink(dev) = self.underlay.reach(gateway) else {
                return Err(public("it is not on a link of this node"));
            };
            Ok(vec![Object::Route(Route {
                table: MAIN_TABLE,
                dst: *subnet,
                metric: Route::default_metric(family),
                target: RouteTarget::Gateway {
                    gateway,
                    dev,
                    onlink: false,
                },
                protocol: RouteProtocol::UNSPEC, // the overlay puts its own mark here
                source: None,
            })])
        })
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let config = r#"{ "Network": "10.42.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00::/48",
                      "Backend": { "Type": "plain" } }"#;
    let input = match Input::new(&Plain, config, 0) {
        Ok(input) => input,
        Err(error) => {
            eprintln!("custom_backend: {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut failed = false;
    for (promise, result) in all(&Plain, &input).await {
        match result {
            Ok(()) => println!("ok      {promise}"),
            Err(reason) => {
                failed = true;
                println!("FAILED  {promise}: {reason}");
            }
        }
    }
    if failed {
        ExitCode::from(3)
    } else {
        ExitCode::SUCCESS
    }
}
