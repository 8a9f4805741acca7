//! Mutations of files: bit flips, cuts and splices, edge cases of sizes and indices, and tokens of a format.

/// SplitMix64: one word of state, so that every case can have its own start.
pub struct Random(u64);

impl Random {
    /// Makes the randomness of one case of a target.
    pub fn of_case(seed: u64, target: &str, number: u64) -> Self {
        let name = target.bytes().fold(seed, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let mut random = Self(name);
        Self(random.next() ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Returns the next word.
    #[expect(clippy::should_implement_trait, reason = "words never end")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Draws a number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// Returns true once in `of` times on average.
    pub fn one_in(&mut self, of: usize) -> bool {
        self.below(of) == 0
    }

    /// Draws an element of `from`, uniformly.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// Draws a position in `length` bytes, often near an end: headers are at the start, footers at the end.
    fn position(&mut self, length: usize) -> usize {
        match self.below(4) {
            0 => self.below(length.clamp(1, 400)),
            1 => length.saturating_sub(1 + self.below(length.clamp(1, 400))),
            _ => self.below(length.max(1)),
        }
    }

    /// Draws a range in `length` bytes, mostly a short one.
    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.position(length).min(length);
        let most = if self.one_in(4) { length - start } else { (length - start).min(16) };
        start..start + if most == 0 { 0 } else { 1 + self.below(most) }
    }

    /// Draws the number of changes of a case: mostly one, so that the reader gets far.
    fn changes(&mut self) -> usize {
        *self.pick(&[1, 1, 1, 2, 2, 3, 5, 9])
    }
}

/// Edge cases of sizes, counts and offsets.
pub const EDGES: [u64; 24] = [
    0,
    1,
    2,
    3,
    7,
    8,
    16,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0xffff,
    0x1_0000,
    1 << 20,
    0x7fff_ffff,
    1 << 31,
    0xffff_ffff,
    1 << 32,
    1 << 40,
    1 << 62,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
];

/// Edge cases of float comparisons and sums.
const FLOATS: [f32; 8] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, f32::MAX, f32::MIN_POSITIVE, 1e20, -1.0];

/// Mutates a binary file.
pub fn mutate_binary(random: &mut Random, seed: &[u8]) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..random.changes() {
        change_binary(random, &mut bytes);
    }
    bytes
}

fn change_binary(random: &mut Random, bytes: &mut Vec<u8>) {
    let place = random.position(bytes.len());
    match random.below(14) {
        0 | 1 => {
            if let Some(byte) = bytes.get_mut(place) {
                *byte ^= 1 << random.below(8);
            }
        }
        2 => {
            if let Some(byte) = bytes.get_mut(place) {
                *byte = random.next() as u8;
            }
        }
        3..=5 => {
            let (edge, width) = (*random.pick(&EDGES), *random.pick(&[1, 2, 4, 8]));
            let near = edge.wrapping_add_signed(random.below(3) as i64 - 1);
            let number = if random.one_in(2) { near.to_le_bytes() } else { near.swap_bytes().to_le_bytes() };
            // The low bytes of the number, in the byte order that was drawn.
            let low = if number == near.to_le_bytes() { &number[..width] } else { &number[8 - width..] };
            overwrite(bytes, place, low);
        }
        6 => overwrite(bytes, place, &varint(*random.pick(&EDGES))),
        7 => {
            let end = (place + 1).min(bytes.len());
            bytes.splice(place.min(end)..end, varint(*random.pick(&EDGES)));
        }
        8 => overwrite(bytes, place, &random.pick(&FLOATS).to_le_bytes()),
        9 => {
            bytes.drain(random.range(bytes.len()));
        }
        10 => {
            let piece = bytes[random.range(bytes.len())].to_vec();
            bytes.splice(place..place, piece);
        }
        11 => {
            let piece: Vec<u8> = (0..=random.below(16)).map(|_| random.next() as u8).collect();
            bytes.splice(place..place, piece);
        }
        12 => match random.one_in(2) {
            true => bytes.truncate(place),
            false => bytes.resize(bytes.len() + random.below(64), random.next() as u8),
        },
        _ => {
            let piece = bytes[random.range(bytes.len())].to_vec();
            overwrite(bytes, place, &piece);
        }
    }
}

fn overwrite(bytes: &mut [u8], place: usize, with: &[u8]) {
    for (byte, new) in bytes.iter_mut().skip(place).zip(with) {
        *byte = *new;
    }
}

/// Encodes a number as protobuf and Thrift do.
fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number > 0x7f {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// Numbers and values of JSON, YAML and CSV.
const VALUES: [&str; 42] = [
    "0",
    "1",
    "2",
    "-1",
    "3",
    "0.5",
    "-0.0",
    "64",
    "513",
    "65536",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "1099511627776",
    "4611686018427387904",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775808",
    "1e400",
    "1e308",
    "1e-400",
    "1e20",
    "NaN",
    "Infinity",
    "-Infinity",
    ".nan",
    "null",
    "true",
    "false",
    "{}",
    "[]",
    "\"\"",
    "\"a\"",
    "[0]",
    "[[]]",
    "[1,18446744073709551615]",
    "{\"a\":1}",
    "\"\\u0000\\u001b[2J\"",
    "\"../../x\"",
];

/// Mutates a text token by token, so that the surroundings of a change still make sense.
pub fn mutate_text(random: &mut Random, text: &[u8], words: &[&str]) -> Vec<u8> {
    let mut text = text.to_vec();
    for _ in 0..random.changes() {
        if random.one_in(16) {
            change_binary(random, &mut text);
        } else {
            text = change_text(random, &text, words);
        }
    }
    text
}

fn change_text(random: &mut Random, text: &[u8], words: &[&str]) -> Vec<u8> {
    let mut tokens = tokens(text);
    if tokens.is_empty() {
        return random.pick(&VALUES).as_bytes().to_vec();
    }
    let place = random.below(tokens.len());
    let end = end_of_value(&tokens, place);
    let deep;
    let new: &[u8] = match random.below(8) {
        0..=2 => random.pick(&VALUES).as_bytes(),
        3 | 4 if !words.is_empty() => random.pick(words).as_bytes(),
        5 if random.one_in(8) => {
            let depth = *random.pick(&[20, 200, 5000]);
            deep = match random.below(3) {
                0 => "[".repeat(depth).into_bytes(),
                1 => "{\"a\":".repeat(depth).into_bytes(),
                _ => "a".repeat(depth).into_bytes(),
            };
            &deep
        }
        _ => tokens[random.below(tokens.len())],
    };
    match random.below(12) {
        0..=6 => _ = tokens.splice(place..end, [new]),
        7 => _ = tokens.drain(place..end),
        8 => tokens.insert(place, new),
        9 => {
            let other = random.below(tokens.len());
            tokens.swap(place, other);
        }
        10 => {
            // Repeat a line, an entry or a whole branch.
            let end = (place + 1 + random.below(12)).max(end).min(tokens.len());
            let piece = tokens[place..end].to_vec();
            let at = random.below(tokens.len());
            tokens.splice(at..at, piece);
        }
        _ => {
            let end = (place + 1 + random.below(12)).min(tokens.len());
            tokens.drain(place..end);
        }
    }
    tokens.concat()
}

/// Splits a text into strings, words with numbers, blanks, and single other characters.
fn tokens(text: &[u8]) -> Vec<&[u8]> {
    let mut tokens = Vec::new();
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || b"_.+-".contains(byte) || *byte >= 0x80;
        let length = match rest[0] {
            b'"' => string_length(rest),
            b' ' => rest.iter().take_while(|byte| **byte == b' ').count(),
            _ => rest.iter().take_while(|byte| is_word(byte)).count().max(1),
        };
        tokens.push(&rest[..length]);
        at += length;
    }
    tokens
}

fn string_length(text: &[u8]) -> usize {
    let mut escaped = true;
    for (at, byte) in text.iter().enumerate() {
        match byte {
            b'"' if !escaped => return at + 1,
            b'\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    text.len()
}

/// Returns the position after the value that starts at `place`: a bracket extends to its partner.
fn end_of_value(tokens: &[&[u8]], place: usize) -> usize {
    let mut depth = 0_usize;
    for (at, token) in tokens.iter().enumerate().skip(place) {
        match token {
            [b'[' | b'{'] => depth += 1,
            [b']' | b'}'] => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return at + 1;
        }
    }
    place + 1
}
