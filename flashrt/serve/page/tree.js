// Where the nodes of a tree are drawn: rows by age, a column for each branch.
//
// IS: numbers. IS NOT: elements of the page (page.js).

/** Nodes of several sessions that share a root, each once, oldest first. */
export function merged(trees) {
  const nodes = new Map();
  for (const tree of trees) {
    for (const node of tree.nodes) {
      const known = nodes.get(node.id);
      if (!known) nodes.set(node.id, { ...node, sessions: [tree.session.id] });
      else {
        known.sessions.push(tree.session.id);
        known.name ??= node.name;
      }
    }
  }
  return [...nodes.values()];
}

/** Rows in order, each {node, row, column, parent: row}; the first child goes on in its parent's
 * column, each other one opens a column. A row comes after its parent's. */
export function layout(nodes) {
  const children = new Map(nodes.map((node) => [node.id, []]));
  for (const node of nodes) children.get(node.parent)?.push(node);
  for (const list of children.values()) list.sort(byAge);
  const roots = nodes.filter((node) => !children.has(node.parent)).sort(byAge);
  const rows = [];
  const rowOf = new Map();
  const columnOf = new Map();
  let columns = 0;
  const ready = [...roots];
  for (const root of roots) columnOf.set(root.id, columns++);
  while (ready.length) {
    ready.sort(byAge);
    const node = ready.shift();
    const at = { node, row: rows.length, column: columnOf.get(node.id), parent: rowOf.get(node.parent) };
    rowOf.set(node.id, at.row);
    rows.push(at);
    children.get(node.id).forEach((child, i) => {
      columnOf.set(child.id, i === 0 ? at.column : columns++);
      ready.push(child);
    });
  }
  return { rows, columns };
}

/** Ids on the way from the root to a node. */
export function path(nodes, id) {
  const known = new Map(nodes.map((node) => [node.id, node]));
  const found = [];
  for (let at = known.get(id); at; at = known.get(at.parent)) found.unshift(at.id);
  return found;
}

function byAge(a, b) {
  return a.created - b.created || (a.id < b.id ? -1 : 1);
}
