//! The laws of the pure half: cutting, grouping, merging, checksums, ICMP, the table.

mod hostile;
mod icmp;
mod make;
mod merge;
mod table;
