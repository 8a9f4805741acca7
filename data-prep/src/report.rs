//! Statistics and the contact sheet of kept and rejected faces.
