// An .onnx_adapter file: the flatbuffer of ONNX Runtime's adapter_schema.fbs, read without a library.

import { readFileSync } from 'node:fs';

/** The file's tensors by name: {dims, data}, of float32. The name that begins with base_sha256. says which base it fits. */
export function readAdapter(path) {
  const bytes = readFileSync(path);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const follow = (at) => at + view.getUint32(at, true);
  // A table begins with the distance back to its vtable, which has the places of its fields, 0 for one that is absent.
  const field = (table, number) => {
    const vtable = table - view.getInt32(table, true);
    const place = 4 + 2 * number < view.getUint16(vtable, true) ? view.getUint16(vtable + 4 + 2 * number, true) : 0;
    return place && table + place;
  };
  const tensors = {};
  const parameters = field(follow(0), 3); // after the format's, the adapter's and the model's version
  const list = follow(parameters);
  for (let place = 0; place < view.getUint32(list, true); place++) {
    const parameter = follow(list + 4 + 4 * place);
    const [name, dims, type, raw] = [0, 1, 2, 3].map((number) => field(parameter, number));
    if (view.getInt32(type, true) !== 1) throw new Error(`${path}: only float32 tensors are read here`);
    const text = follow(name);
    const shape = follow(dims);
    const data = follow(raw);
    const length = view.getUint32(data, true);
    const sizes = Array.from({ length: view.getUint32(shape, true) }, (_, axis) =>
      Number(view.getBigInt64(shape + 4 + 8 * axis, true)),
    );
    // Copied, since a Float32Array needs its bytes at a multiple of 4.
    const values = new Float32Array(bytes.buffer.slice(bytes.byteOffset + data + 4, bytes.byteOffset + data + 4 + length));
    tensors[bytes.toString('utf8', text + 4, text + 4 + view.getUint32(text, true))] = { dims: sizes, data: values };
  }
  return tensors;
}
