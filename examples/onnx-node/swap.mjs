// One session, and adapters swapped on it from run to run, in onnxruntime-node:
//
//   node swap.mjs FOLDER TOKEN,TOKEN,... [ADAPTER.onnx_adapter ...]
//
// FOLDER is what `dora-export merge ... --to onnx-adapters --slot-inputs` made: this runtime has no adapters of its own,
// and does not feed inputs that have a default value. Prints a line of JSON for the base and for each adapter: the logits
// of the last token, and the eight tokens that follow greedily.

import { basename, join } from 'node:path';
import * as ort from 'onnxruntime-node';
import { readAdapter } from './adapter.mjs';

const [folder, tokens, ...files] = process.argv.slice(2);
const session = await ort.InferenceSession.create(join(folder, 'model.onnx'), { logSeverityLevel: 3 });

/** What fills every slot, of the base or of an adapter, and says for which base. */
function slotFeeds(adapter) {
  const feeds = {};
  for (const { name, shape } of session.inputMetadata) {
    const kind = name.slice(name.lastIndexOf('.') + 1);
    if (name.startsWith('base_sha256.')) {
      if (adapter && !(name in adapter)) throw new Error('this adapter was made for another base');
      feeds[name] = new ort.Tensor('float32', new Float32Array(0), [0]);
    } else if (['lora_A', 'lora_B', 'norm_scale'].includes(kind)) {
      const dims = shape.map((size) => (typeof size === 'number' ? size : 0)); // of rank 0
      const size = dims.reduce((one, other) => one * other, 1);
      const given = adapter?.[name] ?? { dims, data: new Float32Array(size).fill(kind === 'norm_scale' ? 1 : 0) };
      feeds[name] = new ort.Tensor('float32', given.data, given.dims);
    }
  }
  return feeds;
}

const int64 = (values) => new ort.Tensor('int64', BigInt64Array.from(values, BigInt), [1, values.length]);

async function generate(slots, prompt, count) {
  let past = {};
  for (const { name, shape } of session.inputMetadata) {
    if (name.startsWith('past_key_values.')) {
      past[name] = new ort.Tensor('float32', new Float32Array(0), [1, shape[1], 0, shape[3]]);
    }
  }
  const made = [];
  let [ids, seen, first] = [prompt, 0, null];
  while (made.length < count) {
    const positions = ids.map((_, place) => seen + place);
    seen += ids.length;
    const mask = int64(Array(seen).fill(1));
    const given = { input_ids: int64(ids), attention_mask: mask, position_ids: int64(positions) };
    const out = await session.run({ ...given, ...past, ...slots });
    const width = out.logits.dims[2];
    const last = out.logits.data.subarray(out.logits.data.length - width);
    first ??= Array.from(last);
    made.push(last.indexOf(last.reduce((most, value) => Math.max(most, value), -Infinity)));
    past = Object.fromEntries(Object.keys(past).map((name) => [name, out[name.replace('past_key_values', 'present')]]));
    ids = [made.at(-1)];
  }
  return { logits: first, tokens: made };
}

const prompt = tokens.split(',').map(Number);
for (const file of [null, ...files]) {
  const found = await generate(slotFeeds(file && readAdapter(file)), prompt, 8);
  console.log(JSON.stringify({ adapter: file ? basename(file) : null, ...found }));
}
