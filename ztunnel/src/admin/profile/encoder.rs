//! As much of protocol buffers as a profile needs: <https://protobuf.dev/programming-guides/encoding/>.

/// A message being written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Message(Vec<u8>);

impl Message {
    /// With an unsigned number.
    pub fn number(mut self, field: u32, value: u64) -> Self {
        self.tag(field, 0);
        self.varint(value);
        self
    }

    /// With a list of unsigned numbers.
    pub fn packed(mut self, field: u32, values: impl IntoIterator<Item = u64>) -> Self {
        let mut packed = Self::default();
        values.into_iter().for_each(|value| packed.varint(value));
        self.bytes(field, &packed.0);
        self
    }

    /// Adds a signed number (an `int64`).
    pub fn signed(&mut self, field: u32, value: i64) {
        self.tag(field, 0);
        self.varint(value as u64);
    }

    /// Adds a text or bytes.
    pub fn bytes(&mut self, field: u32, bytes: &[u8]) {
        self.tag(field, 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    /// Adds a message.
    pub fn nested(&mut self, field: u32, message: Self) {
        self.bytes(field, &message.0);
    }

    /// What was written.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    fn tag(&mut self, field: u32, wire_type: u64) {
        self.varint(u64::from(field) << 3 | wire_type);
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

#[cfg(test)]
pub(in crate::admin) mod tests {
    /// The fields of a message: numbers, and bytes.
    pub(in crate::admin) fn fields(mut bytes: &[u8]) -> Vec<(u64, u64, Vec<u8>)> {
        fn varint(bytes: &mut &[u8]) -> u64 {
            let mut value = 0;
            for shift in (0..).step_by(7) {
                let (first, rest) = bytes.split_first().unwrap();
                *bytes = rest;
                value |= u64::from(first & 0x7f) << shift;
                if first & 0x80 == 0 {
                    return value;
                }
            }
            unreachable!("a varint ends")
        }
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let tag = varint(&mut bytes);
            match tag & 7 {
                0 => fields.push((tag >> 3, varint(&mut bytes), Vec::new())),
                2 => {
                    let length = varint(&mut bytes) as usize;
                    let (text, rest) = bytes.split_at(length);
                    bytes = rest;
                    fields.push((tag >> 3, 0, text.to_vec()));
                }
                other => panic!("wire type {other}"),
            }
        }
        fields
    }
}
