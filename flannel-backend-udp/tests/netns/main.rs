//! Forwarders on real devices and sockets, with real packets, in namespaces of their own.

mod bed;
mod dead;
mod elsewhere;
mod errors;
mod life;
mod packets;
mod refused;
mod versions;
