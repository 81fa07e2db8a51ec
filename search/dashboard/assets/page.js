// Tables come as text: thousands of cells as Dash components would take the browser seconds.
// The server escapes every cell (parts.py), so the text holds only the server's own elements.
(function () {
  function fill(node) {
    node.innerHTML = node.getAttribute('data-html');
  }
  function fillAll(root) {
    if (root.nodeType !== Node.ELEMENT_NODE) { return; }
    if (root.hasAttribute('data-html')) { fill(root); }
    root.querySelectorAll('[data-html]').forEach(fill);
    // A Dash dropdown hides this field from screen readers but not from the Tab key (dash 4.4).
    root.querySelectorAll('.dash-dropdown-focus-target').forEach(function (field) {
      field.tabIndex = -1;
    });
  }
  new MutationObserver(function (changes) {
    changes.forEach(function (change) {
      if (change.type === 'attributes') {
        fill(change.target);
      } else {
        change.addedNodes.forEach(fillAll);
      }
    });
  }).observe(document.documentElement, {
    childList: true, subtree: true, attributes: true, attributeFilter: ['data-html']
  });

  // Their links change the address as dcc.Link does, without loading the page anew.
  document.addEventListener('click', function (event) {
    const link = event.target.closest && event.target.closest('a[data-inner]');
    if (!link || event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey) { return; }
    event.preventDefault();
    history.pushState({}, '', link.href);
    window.dispatchEvent(new CustomEvent('_dashprivate_pushstate', {detail: link.href}));
    window.scrollTo(0, 0);
  });
})();
