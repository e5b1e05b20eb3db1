// What another tau, alpha or fraction would keep, from counts of rollouts with equal (n, n_pos, sum).
// The address may name them: index.html#tau=0.25&alpha=0.05&fraction=0.2
"use strict";

{
  const data = JSON.parse(document.getElementById("choices-data").textContent);
  const byId = (id) => document.getElementById(id);
  const TYPES = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array };
  const column = ([type, text]) =>
    new TYPES[type](Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
  const tables = data.taus.map((table) => {
    const columns = {};
    for (const [name, packed] of Object.entries(table)) columns[name] = column(packed);
    return columns;
  });

  // The score of the selection, in the same order of operations.
  function bis(n, positive, sum, alpha) {
    const p = positive / n;
    return (p * (1 - p) + alpha) * reliability(positive, sum);
  }
  const reliability = (positive, sum) => positive ? sum / data.unit / positive : data.none_positive;

  // Keeps the best of each group; of rollouts that tie at the cut, the same share of each kind.
  function choose(table, alpha, fraction) {
    const { group, n, positive, sum, count } = table;
    const rows = [...group.keys()];
    const score = rows.map((i) => bis(n[i], positive[i], sum[i], alpha));
    rows.sort((a, b) => group[a] - group[b] || score[b] - score[a]);
    const kept = new Float64Array(rows.length), cuts = [];
    for (let start = 0, end; start < rows.length; start = end) {
      const of = group[rows[start]];
      let ranked = 0;
      for (end = start; end < rows.length && group[rows[end]] === of; end++) ranked += count[rows[end]];
      let left = Math.max(1, Math.floor(ranked * fraction));
      for (let at = start, next; at < end && left > 0; at = next) {
        let tied = 0;
        for (next = at; next < end && score[rows[next]] === score[rows[at]]; next++) tied += count[rows[next]];
        for (let i = at; i < next; i++) kept[rows[i]] = count[rows[i]] * Math.min(1, left / tied);
        left -= tied;
        if (left <= 0) cuts.push(score[rows[at]]);
      }
    }
    cuts.sort((a, b) => a - b);
    return { kept, cut: cuts[Math.floor(cuts.length / 2)] };
  }

  function summary(table, weights) {
    const { n, positive, sum } = table;
    let rollouts = 0, mixed = 0, r = 0, steps = 0;
    weights.forEach((weight, i) => {
      rollouts += weight;
      if (positive[i] && positive[i] < n[i]) mixed += weight;
      r += weight * reliability(positive[i], sum[i]);
      steps += weight * n[i];
    });
    return [Math.round(rollouts).toLocaleString("en"), (100 * mixed / rollouts).toFixed(1),
      (r / rollouts).toFixed(3), (steps / rollouts).toFixed(2)];
  }

  // The plane of mixture and R: ranked rollouts in grey, by number, and the share kept in blue.
  function paint(table, kept) {
    const canvas = byId("choices-plane"), pen = canvas.getContext("2d"), cells = 21;
    const all = new Float64Array(cells * cells), some = new Float64Array(cells * cells);
    table.n.forEach((n, i) => {
      const p = table.positive[i] / n, r = reliability(table.positive[i], table.sum[i]);
      const x = Math.ceil(p * (1 - p) * 80 - 1e-9), y = Math.round(r * 20);
      all[y * cells + x] += table.count[i];
      some[y * cells + x] += kept[i];
    });
    const size = canvas.width / cells, most = Math.log1p(Math.max(...all));
    pen.clearRect(0, 0, canvas.width, canvas.height);
    all.forEach((number, at) => {
      if (!number) return;
      const share = some[at] / number, x = at % cells, y = cells - 1 - Math.floor(at / cells);
      pen.fillStyle = share > 0 ? `rgba(0, 114, 178, ${0.25 + 0.75 * share})`
        : `rgba(128, 128, 128, ${0.15 + 0.55 * Math.log1p(number) / most})`;
      pen.fillRect(x * size, y * size, size - 1, size - 1);
    });
  }

  function show() {
    const table = tables[byId("tau").selectedIndex];
    if (!table) return;
    const alpha = Number(byId("alpha").value), fraction = Number(byId("fraction").value);
    if (!(alpha >= 0 && fraction > 0 && fraction <= 1)) return;
    const { kept, cut } = choose(table, alpha, fraction);
    byId("formula-alpha").textContent = alpha;
    byId("formula-tau").textContent = byId("tau").value;
    byId("choices-cut").textContent = cut.toPrecision(6);
    for (const [id, weights] of [["choices-all", table.count], ["choices-kept", kept]]) {
      summary(table, weights).forEach((text, at) => { byId(id).cells[at + 1].textContent = text; });
    }
    paint(table, kept);
  }

  const asked = new URLSearchParams(location.hash.slice(1));
  for (const id of ["tau", "alpha", "fraction"]) {
    if (asked.has(id)) byId(id).value = asked.get(id);
    byId(id).addEventListener("input", show);
  }
  show();
}
