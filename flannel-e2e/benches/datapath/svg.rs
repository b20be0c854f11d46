//! The tables as bars: a column for each table, each way beside bare routing.

use std::fmt::Write;

use crate::report::{Kind, Table};
use crate::ways::WayKind;

/// Tables that stand side by side.
const COLUMNS: usize = 3;
const COLUMN: f64 = 330.0;
const LABEL: f64 = 124.0;
const LONGEST: f64 = 104.0;
const BAR: f64 = 18.0;
const TOP: f64 = 52.0;

const fn colour(way: WayKind) -> &'static str {
    match way {
        WayKind::Bare => "#8a8a8a",
        WayKind::Vxlan => "#c08030",
        WayKind::Udp => "#2e7d4f",
        WayKind::Baseline => "#a04848",
    }
}

/// Draws what more is better of: one stream, four streams, small packets.
pub(crate) fn draw(tables: &[Table]) -> String {
    let mut body = String::new();
    let mut y = TOP;
    for alike in tables.chunk_by(|a, b| a.kinds == b.kinds) {
        for row in alike.chunks(COLUMNS) {
            y = draw_row(&mut body, row, y);
        }
    }
    let width = COLUMN * COLUMNS as f64;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {y:.0}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{width}\" height=\"{y:.0}\" fill=\"white\"/>\n\
         <text x=\"12\" y=\"26\" font-size=\"16\">Between two pods (in brackets: to bare routing)\
         </text>\n{body}</svg>\n"
    )
}

/// Draws tables side by side, and says where the next row begins.
fn draw_row(body: &mut String, tables: &[Table], top: f64) -> f64 {
    let mut end = top;
    for (column, table) in tables.iter().enumerate() {
        let x = COLUMN * column as f64 + 12.0;
        let mut y = top + 14.0;
        writeln!(
            body,
            "<text x=\"{x}\" y=\"{y:.0}\" font-size=\"14\" font-weight=\"bold\">{}</text>",
            table.what
        )
        .ok();
        for kind in [Kind::Stream, Kind::Streams, Kind::Small] {
            if table.kinds.contains(&kind) {
                y = draw_kind(body, table, kind, x, y + 8.0);
            }
        }
        end = f64::max(end, y);
    }
    end + 18.0
}

/// Draws one line of a table, and says where it ends.
fn draw_kind(body: &mut String, table: &Table, kind: Kind, x: f64, top: f64) -> f64 {
    let mut y = top + 12.0;
    let name = kind.name();
    writeln!(body, "<text x=\"{x}\" y=\"{y:.0}\">{name}</text>").ok();
    y += 6.0;
    let values = (0..table.ways.len()).map(|way| table.median(way, kind));
    let values: Vec<f64> = values.collect();
    let most = values.iter().copied().fold(0.0, f64::max);
    for (way, value) in table.ways.iter().zip(&values) {
        let width = LONGEST * value / most;
        let bar = x + LABEL;
        writeln!(
            body,
            "<text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{bar:.0}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{:.1}\" fill=\"{}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{value:.1} ({:.2})</text>",
            bar - 6.0,
            y + 12.0,
            way.name(),
            BAR - 4.0,
            colour(*way),
            bar + width + 6.0,
            y + 12.0,
            value / values[0],
        )
        .ok();
        y += BAR;
    }
    y
}
