//! HTTP server for a folder on a port of this machine, as reliable or faulty as a test wants.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

/// Response to the client.
pub struct Answer {
    /// Status code, reason and further headers, each terminated by a line break.
    pub head: String,
    /// Bytes after the head.
    pub body: Vec<u8>,
    /// Value of `Content-Length`.
    pub length: usize,
}

impl Answer {
    /// Makes an answer that states the length of `body`.
    pub fn new(head: &str, body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self { head: format!("{head}\r\n"), length: body.len(), body }
    }
}

/// Server that runs until it is dropped; later connections are refused.
pub struct FileServer {
    port: u16,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FileServer {
    /// Serves `root`. `alter` receives every request, such as `GET /a/b 0-99` or `GET /a/b whole`, and the correct
    /// answer to it. If it returns `None`, the client waits in vain.
    pub fn start(root: &Path, alter: impl Fn(&str, Answer) -> Option<Answer> + Clone + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let stop = Arc::new(AtomicBool::new(false));
        let (root, stopped): (PathBuf, _) = (root.into(), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let (root, alter) = (root.clone(), alter.clone());
                // A client that leaves early is not a test failure.
                thread::spawn(move || serve(connection, &root, alter));
            }
        });
        Self { port, stop, thread: Some(thread) }
    }

    /// Returns the URL of a path below the root.
    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}/{path}", self.port)
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Answers one request, with or without a range, as an HTTP/1.1 server without ETags.
fn serve(
    mut connection: TcpStream,
    root: &Path,
    alter: impl Fn(&str, Answer) -> Option<Answer>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(connection.try_clone()?).lines();
    let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    // Google's clients escape everything but letters and digits.
    let request = request.trim_end_matches(" HTTP/1.1");
    let request = request.replace("%2F", "/").replace("%2D", "-").replace("%2E", ".");
    let mut range = "whole".to_owned();
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        range = line.strip_prefix("range: bytes=").map_or(range, str::to_owned);
    }
    let path = request.split_once(" /").map_or("", |(_, path)| path);
    let answer = match fs::read(root.join(path)) {
        Ok(content) => part(&content, &range),
        Err(_) => Answer::new("404 Not Found", ""),
    };
    let Some(Answer { head, body, length }) = alter(&format!("{request} {range}"), answer) else {
        return connection.read_to_end(&mut Vec::new()).map(drop);
    };
    write!(connection, "HTTP/1.1 {head}Content-Length: {length}\r\nConnection: close\r\n\r\n")?;
    connection.write_all(&body)
}

/// Clips a range to the content, as RFC 9110 requires.
fn part(content: &[u8], range: &str) -> Answer {
    let Some((from, to)) = range.split_once('-') else { return Answer::new("200 OK", content) };
    let (from, to): (usize, usize) = (from.parse().unwrap(), to.parse().unwrap());
    let end = content.len().min(to + 1);
    if from >= end {
        return Answer::new("416 Range Not Satisfiable", "");
    }
    let head = format!("206 Partial Content\r\nContent-Range: bytes {from}-{}/{}", end - 1, content.len());
    Answer::new(&head, &content[from..end])
}
