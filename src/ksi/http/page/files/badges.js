// The numbers in the navigation, set by the views that know them.

export const badges = new Map();

let changed = () => {};
export const when_badges_change = (call) => { changed = call; };

/** Show a number in the navigation; `what` names it for screen readers. */
export function badge(path, count, what, tone = "") {
  const before = badges.get(path);
  if ((before?.count ?? 0) === count) return;
  if (count) badges.set(path, { count, what, tone });
  else badges.delete(path);
  changed();
}
