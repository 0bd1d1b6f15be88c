// Where the numbers come from: TensorBoard's server, or a page that holds them all. Both answer the same queries.

// Numbers over time: one row per step, one column per name. NaN: there is no number.
export class Grid {
  constructor(names, steps, values) {
    this.names = names;
    this.steps = steps;
    this.values = values;
    this.column = new Map(names.map((name, index) => [name, index]));
  }

  at(row, column) {
    return this.values[row * this.names.length + column];
  }

  // The last row at or before a step; the first row if the step lies before all of them.
  row(step) {
    let low = 0;
    let high = this.steps.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.steps[middle] <= step) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  // One column as [[step, value], ...].
  points(name) {
    const column = this.column.get(name);
    if (column === undefined) return [];
    return Array.from(this.steps, (step, row) => [step, this.at(row, column)]);
  }
}

// The inverse of Grid.pack in grids.py.
export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const steps = new Float64Array(buffer, 4 + length, head.count);
  const values = new Float32Array(buffer, 4 + length + 8 * head.count, head.count * head.names.length);
  return new Grid(head.names, steps, values);
}

// The name of a run for people, without the folder that torchsat adds below the user's directory.
export function shownName(run) {
  return run.replace(/\/torchsat$/, "") || run;
}

function path(name, query) {
  const asked = new URLSearchParams(query).toString();
  return asked ? `${name}?${asked}` : name;
}

// A source that asks each query once and remembers the answer until `forget` is called. A query that failed is asked again.
function remembering(load) {
  let known = new Map();
  const get = (name, query, read) => {
    const key = path(name, query ?? {});
    if (!known.has(key)) {
      const promise = load(key, read);
      const own = known;
      promise.catch(() => own.delete(key));
      known.set(key, promise);
    }
    return known.get(key);
  };
  return {
    json: (name, query) => get(name, query, (answer) => answer.json()),
    grid: (name, query) => get(name, query, async (answer) => unpack(await answer.arrayBuffer())),
    forget: () => (known = new Map()),
  };
}

// TensorBoard's server.
export function fetching(base) {
  return remembering(async (key, read) => {
    const answer = await fetch(base + key);
    if (!answer.ok) throw new Error(`${key}: ${answer.status} ${await answer.text()}`);
    return read(answer);
  });
}

// A page that holds all answers. `table` maps each query to JSON, or to {gzip: base64} of a packed grid.
export function embedded(table) {
  return remembering(async (key, read) => {
    if (!Object.hasOwn(table, key)) throw new Error(`${key} is not in this page`);
    const kept = table[key];
    if (!kept || typeof kept.gzip !== "string") return read(new Response(JSON.stringify(kept)));
    const bytes = Uint8Array.from(atob(kept.gzip), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return read(new Response(stream));
  });
}
