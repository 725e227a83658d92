'use strict';
// Sorts a table by the column whose title is clicked; without script the tables are as they were written.
for (const table of document.querySelectorAll('table.sortable')) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((title, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...title.childNodes);
    title.append(button);
    button.addEventListener('click', () => {
      const down = title.getAttribute('aria-sort') === 'ascending';
      for (const other of table.tHead.rows[0].cells) other.removeAttribute('aria-sort');
      title.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const number = text => text === '' ? NaN : Number(text.replace(/[,\s%×]/g, '').replace('−', '-'));
      const rows = [...body.rows].map(row => ({ row, text: key(row), value: number(key(row)) }));
      const order = (a, b) => {
        if (Number.isNaN(a.value) !== Number.isNaN(b.value)) return Number.isNaN(a.value) ? 1 : -1;
        const sign = down ? -1 : 1;
        return sign * (Number.isNaN(a.value) ? a.text.localeCompare(b.text) : a.value - b.value);
      };
      body.append(...rows.sort(order).map(x => x.row));
    });
  });
}
// Escape closes the picture that is enlarged.
addEventListener('keydown', event => {
  if (event.key === 'Escape') document.querySelectorAll('.picture input:checked').forEach(x => { x.checked = false; });
});
