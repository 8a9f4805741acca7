//! Live curves in a terminal, with the feature `tui`.

#[cfg(not(feature = "tui"))]
mod absent;
#[cfg(feature = "tui")]
mod tui;

#[cfg(not(feature = "tui"))]
pub use absent::LiveCurves;
#[cfg(not(feature = "tui"))]
pub(super) use absent::{AVAILABLE, is_open};
#[cfg(feature = "tui")]
pub use tui::LiveCurves;
#[cfg(feature = "tui")]
pub(super) use tui::{AVAILABLE, is_open};
